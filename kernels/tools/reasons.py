"""Why some calls are predicted to take more than eight times their floor (`predict.FAR`): what binds and why.

By family and label of a point of `predict.points`. The report prints them beside the rows; a test wants one for each
such row, and none for others.
"""

_SCAN = (
    "issue binds: a token of 32 channels with 16 states takes some 540 instructions in the gradient alone, a quarter "
    "of them for a second look at the states, and the ends of segments and the kept states were walked before, as the "
    "forward keeps nothing; the floor counts each state once. It would take the forward's states in memory (four bytes "
    "for each channel and token at 16 states and one in 16 tokens)"
)

BECAUSE: dict[str, str] = {
    "selective_scan 1x8192x2048 states 16, backward": _SCAN,
    "selective_scan 32x196x384 states 16, backward": _SCAN
    + ", and here fewer than six launches and five sums of partial results, which take at least 22 us together",
}
