"""What the callbacks have in common."""

import re

import pytest

from neq.integrations.base import ControllerCallback


@pytest.mark.parametrize("every", [0, -3, True, 2.5, "step"])
def test_every_is_an_epoch_or_a_number_of_steps(every):
    with pytest.raises(ValueError, match=f"every must be 'epoch' or .* got {every!r}"):
        ControllerCallback(None, every, {})


@pytest.mark.parametrize("name", ["polcy", "optimizer", "model"])
def test_options_are_those_of_a_controller(name):
    with pytest.raises(TypeError, match=re.escape(f"'warmup'], not ['{name}']")):
        ControllerCallback(None, "epoch", {name: 1})


def test_an_epoch_of_no_training_is_an_error():
    with pytest.raises(RuntimeError, match="an epoch ended before training started"):
        ControllerCallback(None, "epoch", {})._step()
