"""Tasks in turn: what an arm has learned of them, and what is left of it in the end."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from examples.airbench_net import network
from examples.airbench_settings import Placed, Result, finished, left_by, predecessor, split
from examples.airbench_tasks import TASKS
from examples.cifar_data import Images

if TYPE_CHECKING:
    from examples.airbench_run import Run


def of_stream(run: "Run", own: Result) -> Result:
    """The result of a run that goes on from its arm's run on the task before.

    Steps and seconds are of all tasks that the arm learned. Accuracies, of one view:

    - learned: on each of these tasks, when it had been learned;
    - kept: now, on these and on what the arm started from, each with the head that it had then.
    """
    task, accuracy = run.settings.task, own["accuracy_of_one_view"]
    chain = list(_chain(run))
    last, where = chain[0]
    earlier = finished(last, where.output)
    assert earlier is not None  # else this run could not have begun
    learned = earlier.get("learned", {last.task: earlier["accuracy_of_one_view"]})
    return {
        **own,
        "steps": dict(Counter(earlier["steps"]) + Counter(own["steps"])),
        "seconds": {k: earlier["seconds"][k] + seconds for k, seconds in own["seconds"].items()},
        "learned": {**learned, task: accuracy},
        "kept": {**{placed[0].task: _kept(run, placed) for placed in chain[::-1]}, task: accuracy},
    }


def _chain(run: "Run") -> Iterator[Placed]:
    """The runs that this one comes after, the last first."""
    placed = predecessor(run.settings, run.where)
    while placed is not None:
        yield placed
        placed = predecessor(*placed)


def _kept(run: "Run", placed: Placed) -> float:
    """The accuracy on an earlier task, of the model as it is, with the head as it was."""
    earlier = placed[0]
    data = TASKS[earlier.task].data(run.data)
    images = split(data, run.settings)[1]
    images = Images(*(t.to(run.where.device) for t in images))
    head = network(earlier.net, earlier.width, len(data.classes)).head
    weights = left_by(*placed).model
    head.load_state_dict({k.removeprefix("head."): t for k, t in weights.items() if "head." in k})
    now, run.model.head = run.model.head, head.to(run.where.device)
    try:
        [accuracy] = run.accuracies(images, several=False)
    finally:
        run.model.head = now
    return accuracy
