"""Going on with a run that has its answer: which budgets are more, and who stays a candidate where nothing is new."""

from __future__ import annotations

from mixnas.search.config import Config
from mixnas.search.run.directory import Run
from mixnas.search.run.front import BESIDE, Front
from mixnas.search.run.typed import typed
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.errors import ConfigError, counted


def check_budget(run: Run, changed: Config) -> None:
    """Refuse a number of trials that was changed to one which asks for none.

    As many as are done end the search of a run that was stopped; a finished one has then to be changed in something
    else.

    Args:
        run: What is gone on with.
        changed: Under which configuration.

    Raises:
        ConfigError: It asks for no more than there is; the message says how many there are and what to ask for.
    """
    before, now = run.config(), changed.to_plain()
    asked, search = changed.search.trials, before.get("search")
    if not isinstance(search, dict) or search.get("trials") == asked:
        return
    status = run.status()
    done = status.done + status.failed
    now["search"]["trials"] = search.get("trials")
    same = now == before
    if asked > done or (asked == done and not (same and run.manifest.get("finished"))):
        return
    if run.manifest.get("finished"):
        instead = "Ask for more" if same else "Leave --trials out, or ask for more"
    else:
        instead = f"--trials {done} ends its search and goes on with what follows; or ask for more"
    raise ConfigError(
        f"{run.path}: --trials (search.trials) is {asked}, in all, and {counted(done, 'trial')} "
        f"{'is' if done == 1 else 'are'} done already: that asks for none. {instead}, for example: "
        f"nas resume {typed(run.path)} --trials {2 * done}"
    )


def counts(results: Results) -> dict[str, int]:
    """How many trials there are of each kind, as a front counts them."""
    return {
        **{status: results.counts[status] for status in ("done", "failed", "duplicate", "infeasible")},
        **({BESIDE: results.queued} if results.queued else {}),
    }


def given(results: Results) -> Results:
    """The trials that the search was given, without those that the run wanted beside: who is likely to be a finalist
    by these is so however many of the others were evaluated before it was stopped.
    """
    records = (record for record in results.records if not record.queued)
    return Results(results.objectives, results.constraints, records, results.reference)


def chosen_before(known: Front | None, results: Results) -> list[TrialRecord]:
    """The finalists of a run that has its answer and no trials since; empty of others.

    They were chosen by what was measured on the way to the answer, of which it has a part: others would be chosen now.
    """
    if known is None or known.trials != counts(results):
        return []
    numbers = {member.trial for member in (*known.members, *known.others) if not member.weights_from}
    return [record for record in results.records if record.number in numbers]
