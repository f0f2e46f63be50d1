import pytest
import torch

import fairseq_adaptive.plugin  # noqa: F401  applies the patches
from fairseq import checkpoint_utils


@pytest.fixture
def complete():
    """``complete(extra_state)``: the least that fairseq loads as a checkpoint."""

    def make(extra_state):
        return {
            "args": None,
            "cfg": None,
            "model": {},
            "optimizer_history": [
                {
                    "criterion_name": "CrossEntropyCriterion",
                    "optimizer_name": "FairseqAdam",
                    "lr_scheduler_state": {},
                    "num_updates": 1,
                }
            ],
            "extra_state": {"train_iterator": {"epoch": 1}, **extra_state},
        }

    return make


@pytest.fixture
def through_a_file(complete, tmp_path):
    """``through_a_file(extra_state)``: what a training that resumes gets."""

    def save_and_load(extra_state):
        path = str(tmp_path / "checkpoint.pt")
        checkpoint_utils.torch_persistent_save(complete(extra_state), path)
        torch.load(path, weights_only=True)
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        assert "numpy_arrays" not in state
        del state["extra_state"]["train_iterator"]
        return state["extra_state"]

    return save_and_load
