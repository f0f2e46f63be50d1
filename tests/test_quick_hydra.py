"""What the tests do to hydra changes nothing of what it composes."""

import pytest
from fairseq import options
from fairseq.dataclass import utils

TASKS = {
    "translation": "--arch shared_transformer --criterion label_smoothed_cross_entropy --optimizer adam",
    "language_modeling": "--arch shared_transformer_lm --criterion adaptive_compute_loss",
}
FLAGS = (
    ["--seed", "7"],
    ["--lr", "0.1,0.2", "--save-dir", "a b=c,'d\"[x]"],
    ["--update-freq", "2,3"],
    ["--max-tokens", "100"],
)


@pytest.mark.parametrize("task", TASKS)
def test_configurations_are_hydras(task, monkeypatch):
    quick = utils.compose
    assert quick.stock is not quick  # as conftest.py has it
    for flags in FLAGS:  # the first fills the cache, the others change what it has
        words = ["DATA", "--task", task, *TASKS[task].split(), *flags]
        args = options.parse_args_and_arch(options.get_training_parser(), words)
        found = utils.convert_namespace_to_omegaconf(args)
        monkeypatch.setattr(utils, "compose", quick.stock)
        expected = utils.convert_namespace_to_omegaconf(args)
        monkeypatch.setattr(utils, "compose", quick)
        assert found == expected and str(found) == str(expected)
