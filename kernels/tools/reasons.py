"""Why some calls are predicted to take more than eight times their floor (`predict.FAR`): what binds and why.

By family and label of a point of `predict.points`. The report prints them beside the rows; a test wants one for each
such row, and none for others.
"""

BECAUSE: dict[str, str] = {}
