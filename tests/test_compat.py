import argparse
import contextlib
import fractions
import functools
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import TokenBlockDataset, data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data
from fairseq_adaptive import compat
from fairseq_adaptive.errors import UsageError


class Runs:
    """Pickles as a call of os.system, as a malicious checkpoint would."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_translation_data(tmp_path_factory.mktemp("data"), n_train=40)


def train_flags(data, save_dir, *more):
    return [
        data,
        "--user-dir",
        USER_DIR,
        "--arch",
        "transformer",
        *TINY_TRANSFORMER,
        "--optimizer",
        "adam",
        "--lr",
        "0.001",
        "--batch-size",
        "20",
        "--cpu",
        "--num-workers",
        "0",
        "--save-dir",
        save_dir,
        *more,
    ]


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("checkpoint")
    run("fairseq-train", *train_flags(data, save_dir, "--max-update", "2", "--no-epoch-checkpoints"))
    return save_dir / "checkpoint_last.pt"


@pytest.fixture
def state(checkpoint):
    return torch.load(checkpoint, weights_only=True)


@pytest.fixture
def malicious(state, tmp_path):
    path = tmp_path / "malicious.pt"
    torch.save({**state, "extra": Runs(f"touch {tmp_path}/ran")}, path)
    return path


def assert_refused(done, *words):
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert len(errors) == 1 and all(str(word) in errors[0] for word in words), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_apply_twice_mends_once():
    mended = list(compat.applied), checkpoint_utils.load_checkpoint_to_cpu, distributed_utils.call_main
    assert compat.apply()
    assert mended == (compat.applied, checkpoint_utils.load_checkpoint_to_cpu, distributed_utils.call_main)
    assert len(set(compat.applied)) == len(compat.applied) >= 6


def test_numpy_2_datasets():
    sentences, sizes = [torch.tensor([5, 6, 2]), torch.tensor([7, 2])], np.array([3, 2])
    blocks = TokenBlockDataset(sentences, sizes, block_size=None, pad=1, eos=2, break_mode="eos")
    assert [block.tolist() for block in blocks] == [[5, 6, 2], [7, 2]]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20, 24])
def test_no_sentence_is_dropped_from_batches(size):
    batches = data_utils.batch_by_size(range(size), lambda index: 5, max_tokens=60, required_batch_size_multiple=8)
    assert [index for batch in batches for index in batch] == list(range(size))
    assert all(len(batch) == 8 for batch in batches[:-1])


def test_checkpoint_with_namespace_loads(state, tmp_path):
    args = argparse.Namespace(arch="transformer", task="translation", lr=0.5)
    torch.save({**state, "args": args, "cfg": None}, tmp_path / "old.pt")
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"))
    assert loaded["cfg"].model.arch == "transformer" and loaded["args"].lr == [0.5]


def test_stock_commands_read_a_checkpoint(data, checkpoint):
    done = run("fairseq-generate", data, "--user-dir", USER_DIR, "--path", checkpoint, "--cpu", "--beam", "2")
    # all 20: the last 4 are no multiple of 8
    assert sum(line.startswith("H-") for line in done.stdout.splitlines()) == 20


def test_from_pretrained(data, checkpoint):
    from fairseq.models.transformer import TransformerModel

    hub = TransformerModel.from_pretrained(str(checkpoint.parent), checkpoint.name, str(data))
    assert isinstance(hub.translate("src01 src02", beam=2), str)


def test_from_pretrained_refuses(data, malicious):
    from fairseq.models.transformer import TransformerModel

    with pytest.raises(UsageError, match=r"malicious\.pt is refused: it holds (posix|nt)\.system"):
        TransformerModel.from_pretrained(str(malicious.parent), malicious.name, str(data))
    assert not (malicious.parent / "ran").exists()


@pytest.mark.parametrize("kind", ["fp16", "legacy file format"])
def test_kinds_of_checkpoint(kind, data, state, tmp_path):
    if kind == "fp16":
        state["model"] = {name: weight.half() for name, weight in state["model"].items()}
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path, _use_new_zipfile_serialization=kind == "fp16")
    (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], arg_overrides={"data": str(data)})
    expected = state["model"]["encoder.layers.0.fc1.weight"].float()
    assert torch.equal(model.state_dict()["encoder.layers.0.fc1.weight"], expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_other_class_is_refused_by_name(zipped, state, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({**state, "extra": fractions.Fraction(1, 2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"other\.pt is refused: it holds fractions\.Fraction.*add_safe_globals"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


@pytest.mark.parametrize("content", ["cut short", "empty", "text"])
def test_unreadable_file(content, checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    path = tmp_path / "broken.pt"
    path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "text": b"hello world\n"}[content])
    with pytest.raises(UsageError, match=r"broken\.pt cannot be read"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_errors_of_other_origin_stay(monkeypatch, checkpoint):
    monkeypatch.setattr(checkpoint_utils, "_upgrade_state_dict", lambda state: state["absent"])
    with pytest.raises(KeyError, match="absent"):
        checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))


@pytest.mark.parametrize("command", ["fairseq-generate", "fairseq-validate", "fairseq-train"])
def test_stock_commands_refuse_malicious_checkpoint(command, data, malicious, tmp_path):
    if command == "fairseq-train":
        flags = train_flags(data, tmp_path / "new", "--max-update", "1", "--restore-file", malicious)
    else:
        flags = [
            data,
            "--user-dir",
            USER_DIR,
            "--path",
            malicious,
            "--cpu",
            "--task",
            "translation",
            "--batch-size",
            "8",
        ]
    assert_refused(run(command, *flags, check=False), malicious, "posix.system")
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("new/*.pt"))


def test_retried_save_can_be_read(monkeypatch, tmp_path):
    save, failures = torch.save, [OSError(5, "Input/output error")]

    def flaky_save(obj, f):
        if failures:
            f.write(b"the first half of a checkpoint")
            raise failures.pop()
        save(obj, f)

    monkeypatch.setattr(torch, "save", flaky_save)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    checkpoint_utils.torch_persistent_save({"weight": torch.arange(3)}, str(tmp_path / "a.pt"))
    assert not failures
    assert torch.load(tmp_path / "a.pt", weights_only=True)["weight"].tolist() == [0, 1, 2]


@contextlib.contextmanager
def no_file_over(size):
    """Every write beyond ``size`` bytes fails, as on a full disk; pytest's own output, too, so not for long."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("how", ["save", "copy"])
def test_failed_write_keeps_the_old_checkpoint(how, monkeypatch, tmp_path):
    old, new = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint2.pt"
    old.write_bytes(b"old" * 100)
    new.write_bytes(b"new" * 10000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    refused = pytest.raises(UsageError, match=r"cannot save checkpoint .*checkpoint_last\.pt: .*File too large")
    with refused, no_file_over(1000):
        if how == "save":
            checkpoint_utils.torch_persistent_save({"weight": torch.zeros(10000)}, str(old))
        else:
            PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_bytes() == b"old" * 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint2.pt", "checkpoint_last.pt"]


def test_copy_replaces(tmp_path):
    (tmp_path / "a.pt").write_text("new")
    (tmp_path / "b.pt").write_text("old")
    assert PathManager.copy(str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), overwrite=True)
    assert (tmp_path / "b.pt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_training_on_a_full_disk(data, checkpoint, tmp_path):
    last = tmp_path / checkpoint.name
    shutil.copy(checkpoint, last)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20000, 20000))
    done = run("fairseq-train", *train_flags(data, tmp_path, "--max-update", "4"), check=False, preexec_fn=limit)
    assert_refused(done, "cannot save checkpoint", tmp_path, "File too large")
    assert last.read_bytes() == checkpoint.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_lone_workers_are_refused(monkeypatch):
    training = argparse.Namespace(distributed_world_size=1, distributed_rank=0)
    assert distributed_utils.is_master(training)
    for name, value in ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1"), ("RANK", "1"), ("WORLD_SIZE", "2"):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun started 2 workers"):
        distributed_utils.is_master(training)
    assert distributed_utils.is_master(argparse.Namespace(distributed_world_size=2, distributed_rank=0))


@pytest.mark.parametrize("count", (1, 7, 8, 20, 21))
@pytest.mark.parametrize("limits", ({"max_tokens": 50}, {"max_sentences": 8}, {"max_tokens": 10_000}), ids=str)
def test_no_sentence_is_dropped(count, limits):
    lengths = np.arange(3, 3 + count)
    batches = data_utils.batch_by_size(
        np.arange(count), lengths.__getitem__, num_tokens_vec=lengths, required_batch_size_multiple=8, **limits
    )
    assert np.concatenate(batches).tolist() == list(range(count))
    assert all(len(batch) < 8 or len(batch) % 8 == 0 for batch in batches[:-1])


def test_no_sentences_make_no_batch():
    assert data_utils.batch_by_size([], len, max_tokens=9, required_batch_size_multiple=8) == []


def test_resuming_makes_the_same_batches(data):
    """An iterator made in epoch 3 goes through the batches that one made in epoch 1 keeps for all epochs."""
    batches = []
    for epoch in (1, 3):
        cfg = TranslationConfig(data=str(data), source_lang="src", target_lang="tgt", train_subset="train")
        cfg.dataset_impl = "mmap"
        task = TranslationTask.setup_task(cfg)
        task.load_dataset("train")
        iterator = task.get_batch_iterator(task.dataset("train"), max_sentences=4, seed=1, epoch=epoch)
        assert iterator.epoch == epoch
        batches.append([sorted(batch) for batch in iterator.frozen_batches])
    assert batches[0] == batches[1] and len(batches[0]) == 10


READ_AHEAD = """
import torch
from fairseq.data import iterators

class Batches:
    def __len__(self):
        return 100

    def __iter__(self):
        return (torch.ones(500, 500) @ torch.ones(500, 500) for _ in range(100))

{import_user_dir}
print(len(next(iterators.BufferedIterator({size}, Batches()))))
"""


@pytest.mark.parametrize("size", [1, 50])
def test_leaving_while_batches_are_read_ahead(size):
    code = READ_AHEAD.format(size=size, import_user_dir="import fairseq_adaptive.plugin")
    done = run("python", "-c", code, cwd=USER_DIR + "/..")
    assert done.stdout == "500\n" and "terminate called" not in done.stderr


COUNTING_TASK = """
import fairseq_adaptive.plugin
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq_cli.train import cli_main

@register_task("counting_translation", dataclass=TranslationConfig)
class CountingTask(TranslationTask):
    def train_step(self, *args, **kwargs):
        if "steps" not in self.state._state:
            self.state.add_factory("steps", int)
        self.state.merge_state_dict({"steps": self.state.steps + 1})
        print("step", self.state.steps)
        return super().train_step(*args, **kwargs)

cli_main()
"""


def test_state_of_a_task_survives_a_resume(data, tmp_path):
    for updates, expected in (2, "step 1\nstep 2\n"), (3, "step 3\n"):
        flags = train_flags(data, tmp_path / "save", "--max-update", updates, "--task", "counting_translation")
        done = run("python", "-c", COUNTING_TASK, *flags, cwd=USER_DIR + "/..")
        assert "".join(line + "\n" for line in done.stdout.splitlines() if line.startswith("step ")) == expected


@pytest.mark.parametrize("flag", ["--bf16", "--amp"])
def test_bfloat16_on_a_cpu(flag, data, tmp_path):
    flags = "--max-update", "20", "--no-epoch-checkpoints", "--no-progress-bar", "--log-format", "json"
    losses = {}
    for name, more in ("fp32", ()), (flag, (flag,)):
        done = run("fairseq-train", *train_flags(data, tmp_path / name, *flags, *more))
        losses[name] = [
            json.loads(line[line.index("{") :])["train_loss"]
            for line in done.stdout.splitlines()
            if '"train_loss"' in line
        ]
    losses = {name: np.array(values, dtype=float) for name, values in losses.items()}
    assert len(losses[flag]) == 7 and losses[flag][-1] < losses[flag][0] - 0.5
    np.testing.assert_allclose(losses[flag], losses["fp32"], rtol=0.01)
    assert (losses[flag] != losses["fp32"]).any()  # computed in another precision
    weights = torch.load(tmp_path / flag / "checkpoint_last.pt", weights_only=False)["model"]
    assert all(weight.dtype == torch.float32 for weight in weights.values() if weight.is_floating_point())


def test_half_precision_on_a_cpu_is_refused(data, tmp_path):
    assert_refused(run("fairseq-train", *train_flags(data, tmp_path, "--fp16"), check=False), "--fp16", "--bf16")


def test_gradients_that_are_no_numbers_end_bfloat16_training(data, tmp_path):
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "__init__.py").write_text(
        f"import sys\nsys.path.insert(0, {USER_DIR.rpartition('/')[0]!r})\nimport fairseq_adaptive.plugin\n"
        "from fairseq.criterions import register_criterion\n"
        "from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig\n"
        "@register_criterion('broken_cross_entropy', dataclass=CrossEntropyCriterionConfig)\n"
        "class Broken(CrossEntropyCriterion):\n"
        "    def compute_loss(self, *args, **kwargs):\n"
        "        loss, nll = super().compute_loss(*args, **kwargs)\n"
        "        return loss * float('inf'), nll\n"
    )
    done = run(
        "fairseq-train",
        *train_flags(data, tmp_path / "run", "--bf16", "--max-update", "2"),
        "--user-dir",
        tmp_path / "plugin",
        "--criterion",
        "broken_cross_entropy",
        check=False,
    )
    assert done.returncode != 0 and "gradients are Nan/Inf" in done.stderr
