import argparse
import dataclasses
import logging
import os
import sys

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU then; Triton reads it when fairseq imports it

# tests measure no speeds: on any machine products are those of one library, and --bf16 is what it says
os.environ["FAIRSEQ_ADAPTIVE_PRODUCTS"], os.environ["FAIRSEQ_ADAPTIVE_BF16"] = "onednn", "always"

from fairseq.data import Dictionary  # noqa: E402
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY  # noqa: E402

import fairseq_adaptive.plugin  # noqa: E402, F401  registers models
import quick_hydra  # noqa: E402

quick_hydra.install()


# the models are so small that a second thread only waits, and for long where other processes use the cores
torch.set_num_threads(1)

# the same cases in every run; HYPOTHESIS_PROFILE=explore draws others
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# the files that take longest, which begin first: so no worker waits for another at the end
LONGEST = (
    "test_pages_run.py",
    "test_precision.py",
    "test_outputs.py",
    "test_binaries.py",
    "test_golden_losses.py",
    "test_torchrun.py",
    "test_kills.py",
    "test_untrusted_flags.py",
    "test_evaluation_follows_training.py",
    "test_presets.py",
    "test_plugin.py",
    "test_changed_modules.py",
    "test_compute_report.py",
    "test_calibrate.py",
)
HOOK = sys.excepthook


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def own_hook(monkeypatch):
    """torch.distributed puts a hook of its own, for good, before the one that explains errors."""
    monkeypatch.setattr(sys, "excepthook", HOOK)


@pytest.fixture(autouse=True)
def log_stays():
    """Commands, which end with their process, turn messages off for good."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


class Task:
    """What a fairseq model asks of its task when it is built."""

    def __init__(self, dictionary):
        self.source_dictionary = self.target_dictionary = self.src_dict = self.tgt_dict = dictionary


@dataclasses.dataclass
class NoConfig:
    """Of models that have none: their flags are those of argparse."""


@pytest.fixture(scope="session")
def dictionary():
    """40 words behind fairseq's four symbols, rounded up to 48 entries."""
    words = Dictionary()
    for number in range(40):
        words.add_symbol(f"word{number}", n=100 - number)
    words.finalize()
    return words


@pytest.fixture(scope="session")
def task(dictionary):
    return Task(dictionary)


@pytest.fixture
def build(task):
    """``build(arch, flag=value ...)``: a model as fairseq-train would build it, from a fixed seed, in float64 eval mode."""

    def build(arch, seed=1, dtype=torch.float64, words=None, **flags):
        parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
        model_class = ARCH_MODEL_REGISTRY[arch]
        model_class.add_args(parser)
        args = parser.parse_args([])
        defaults = {"max_source_positions": 64, "max_target_positions": 64, "tokens_per_sample": 64}
        for name, value in {**defaults, **flags}.items():
            setattr(args, name, value)
        if arch in ARCH_CONFIG_REGISTRY:
            ARCH_CONFIG_REGISTRY[arch](args)
        for field in dataclasses.fields(getattr(model_class, "__dataclass", None) or NoConfig):
            if not hasattr(args, field.name):
                setattr(args, field.name, field.default)
        torch.manual_seed(seed)
        return model_class.build_model(args, Task(words) if words else task).to(dtype).eval()

    return build


@pytest.fixture
def batch(dictionary):
    """Three sentence pairs of different lengths: source left-padded and target right-padded, as fairseq's task pads."""
    torch.manual_seed(5)
    pad, eos = dictionary.pad(), dictionary.eos()
    lengths, target_lengths = (9, 6, 4), (5, 8, 3)
    source = torch.full((3, 9), pad)
    previous = torch.full((3, 8), pad)
    for row, (length, target_length) in enumerate(zip(lengths, target_lengths)):
        source[row, -length:] = torch.cat((torch.randint(4, 44, (length - 1,)), torch.tensor([eos])))
        previous[row, :target_length] = torch.cat((torch.tensor([eos]), torch.randint(4, 44, (target_length - 1,))))
    return {"src_tokens": source, "src_lengths": torch.tensor(lengths), "prev_output_tokens": previous}
