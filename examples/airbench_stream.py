"""Tasks in turn: what an arm has learned of them, and what is left of it in the end."""

from collections import Counter
from collections.abc import Callable

from examples.airbench_settings import Placed, Result, Settings, Where, finished, lineage


def of_stream(
    own: Result, settings: Settings, where: Where, accuracy_now: Callable[[Placed], float]
) -> Result:
    """The result of a run that goes on from its arm's run on the task before.

    Steps and seconds are of all tasks that the arm learned. Accuracies, of one view:

    - learned: on each of these tasks, when it had been learned;
    - kept: now, on these and on what the arm started from.

    Args:
        own: The run's own result.
        accuracy_now: The accuracy now on the task of an earlier run.
    """
    *earlier, _ = lineage(settings, where)
    last, place = earlier[-1]
    before = finished(last, place.output)
    assert before is not None  # else the run could not have begun
    learned = before.get("learned", {last.task: before["accuracy_of_one_view"]})
    kept = {placed[0].task: accuracy_now(placed) for placed in earlier}
    this = {settings.task: own["accuracy_of_one_view"]}
    return {
        **own,
        "steps": dict(Counter(before["steps"]) + Counter(own["steps"])),
        "seconds": {k: before["seconds"][k] + seconds for k, seconds in own["seconds"].items()},
        "learned": learned | this,
        "kept": kept | this,
    }
