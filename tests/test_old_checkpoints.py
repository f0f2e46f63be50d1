"""Checkpoints that commit aa13b37 wrote load, and the models answer as they did there."""

import pytest
import torch

from old_checkpoints.cases import CASES, answers, build, load


@pytest.mark.parametrize("name", CASES)
def test_loads_and_answers_as_it_did(name):
    old = load(name)
    model = build(old["arch"], dict(old["flags"]))
    model.upgrade_state_dict(old["weights"])
    model.load_state_dict(old["weights"], strict=True)
    found = answers(model, old["arch"], old["inputs"])
    assert found.keys() == old["answers"].keys()
    for key, expected in old["answers"].items():
        if key == "gradients":  # some parameters had none then and have zeros now, which workers wait for
            found[key], expected = (each[each != 0] for each in (found[key], expected))
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{key}: {text}")
