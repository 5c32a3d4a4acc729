"""What to do about a run: a few sentences, from the records of its epochs."""

from collections.abc import Sequence

from neq.history import SPEED_EXPONENTS, EpochRecord

EPOCHS = 3  # of the same, before something is said about it
LITTLE = 0.05  # of a step's FLOPs
NEARLY_ALL = 0.99  # of the neurons
LEVEL_EPOCHS = 10  # NeVe's patience
STILL = 1e-3  # NeVe stops below this mean |v|


def advise(
    records: Sequence[EpochRecord], epochs: int | None, warmup: int, freezes: bool
) -> tuple[str, ...]:
    """What the rest of a training will save, and what to try.

    Args:
        records: The records of the epochs so far, with the latest last.
        epochs: How many epochs the training has in all; None if that is not known.
        warmup: How many epochs train all neurons.
        freezes: Is the policy one that freezes neurons?
    """
    decided = [r for r in records if r.epoch >= max(1, warmup)] if freezes else []
    found = [
        _rest(records[-1], epochs) if freezes else None,
        _little(decided[-EPOCHS:]),
        _everything(decided[-EPOCHS:]),
        _level(records),
    ]
    return tuple(sentence for sentence in found if sentence)


def _rest(last: EpochRecord, epochs: int | None) -> str | None:
    """What the rest of the training saves, with its arithmetic."""
    left = 0 if epochs is None else epochs - last.epoch
    if left < 1 or not last.step_flops:
        return None
    saved = last.step_saved_next
    text = (
        f"If it goes on like this, the {left} epochs left save {saved:.1%} of a step's FLOPs each: "
        f"{left} x {saved:.1%} = {left * saved:.2f} epochs"
    )
    if last.time_saved is not None and last.dense_seconds is not None:
        seconds = left * last.time_saved * last.dense_seconds
        text += (
            f"; by the clock {left} x {last.time_saved:.1%} of {last.dense_seconds:.1f} s = "
            f"{seconds:.1f} s"
        )
    return f"{text}."


def _little(last: Sequence[EpochRecord]) -> str | None:
    """Nothing froze, or it saves next to nothing."""
    if len(last) < EPOCHS:
        return None
    now = last[-1]
    if now.step_flops and now.step_saved_at_most < LITTLE:
        return (
            f"Freezing every neuron would save {now.step_saved_at_most:.1%} of a step's FLOPs: the "
            "rest of the model is out of neq's reach (neq.summary says why), or left alone."
        )
    if all(r.frozen_share == 0 for r in last):
        what = "nothing has frozen"
    elif now.step_flops and all(r.step_saved_next < LITTLE for r in last):
        what = f"less than {LITTLE:.0%} of a step's FLOPs was saved (now {now.step_saved_next:.1%})"
    else:
        return None
    return (
        f"For {EPOCHS} epochs {what}: try neq.Equilibrium(share=0.5){_eps_for_half(now)}, "
        "neq.Budget(share=...) or neq.BottomUp, or train without neq."
    )


def _eps_for_half(record: EpochRecord) -> str:
    enough = (e for e in SPEED_EXPONENTS if record.would_freeze(10.0**e) >= 0.5)
    exponent = next(enough, None)
    if exponent is None:
        return ""
    share = record.would_freeze(10.0**exponent)
    return f" (eps={10.0**exponent:.1e} would freeze {share:.0%} now)"


def _everything(last: Sequence[EpochRecord]) -> str | None:
    if len(last) < EPOCHS or any(r.frozen_share < NEARLY_ALL for r in last):
        return None
    return (
        f"For {EPOCHS} epochs {last[-1].frozen_share:.1%} of neurons are frozen: stop here, or let "
        "more train with a smaller eps, neq.Equilibrium(share=...) or neq.Budget(share=...)."
    )


def _level(records: Sequence[EpochRecord]) -> str | None:
    """Velocities have levelled off, by the rule of NeVe."""
    changes = [r.velocity_change for r in records if r.velocity_change is not None]
    if len(changes) <= LEVEL_EPOCHS or min(changes[-LEVEL_EPOCHS:]) < min(changes[:-LEVEL_EPOCHS]):
        return None
    text = (
        f"Velocities have levelled off: for {LEVEL_EPOCHS} epochs their mean squared change has "
        "not been less than before"
    )
    speed = records[-1].mean_speed
    if speed is not None and speed < STILL:
        return f"{text}, and neurons hardly move (mean |v| {speed:.1e}): training could stop."
    return f"{text}: lower the learning rate, or let neq.ReduceLROnEquilibrium do so."
