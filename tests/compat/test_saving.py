"""A checkpoint that cannot be read again is never left behind."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data
from fairseq_adaptive.errors import UsageError


@pytest.fixture
def loads(monkeypatch):
    """The files that are loaded, in order."""
    stock, paths = checkpoint_utils.load_checkpoint_to_cpu, []

    def load_checkpoint_to_cpu(path, *args, **kwargs):
        paths.append(path)
        return stock(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint_utils, "load_checkpoint_to_cpu", load_checkpoint_to_cpu)
    return paths


def test_the_first_checkpoint_of_a_run_is_read_back(complete, loads, tmp_path):
    for run_folder in "one", "two":
        (tmp_path / run_folder).mkdir()
        for name in "checkpoint1.pt", "checkpoint2.pt":
            checkpoint_utils.torch_persistent_save(complete({}), str(tmp_path / run_folder / name))
    assert loads == [str(tmp_path / folder / "checkpoint1.pt.tmp") for folder in ("one", "two")]
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["checkpoint1.pt"] * 2 + ["checkpoint2.pt"] * 2


@pytest.mark.parametrize("full", [True, False], ids=["of a training", "of something else"])
def test_what_cannot_be_read_back_replaces_nothing(full, complete, monkeypatch, tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    path.write_bytes(b"the last good one")
    save = torch.save

    def cut_short(obj, f):
        save(obj, f)
        f.truncate(f.tell() // 2)

    monkeypatch.setattr(torch, "save", cut_short)
    state = {**(complete({}) if full else {}), "weight": torch.ones(3000)}
    for _ in range(2):  # the next attempt is a first one again
        with pytest.raises(
            UsageError, match=r"cannot save checkpoint .*_last\.pt: the first one of this run .*cannot be read"
        ):
            checkpoint_utils.torch_persistent_save(state, str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint_last.pt"]
    assert path.read_bytes() == b"the last good one"


def test_what_the_loader_refuses_is_told(complete, monkeypatch, tmp_path):
    def refuse(path):
        raise UsageError("it names an architecture that is not allowed")

    monkeypatch.setattr(checkpoint_utils, "load_checkpoint_to_cpu", refuse)
    with pytest.raises(
        UsageError, match=r"cannot save checkpoint .*a\.pt: .*names an architecture that is not allowed$"
    ):
        checkpoint_utils.torch_persistent_save(complete({}), str(tmp_path / "a.pt"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rename", [True, False], ids=["local", "remote"])
def test_asynchronous_writing(rename, complete, loads, monkeypatch, tmp_path):
    """Only the first checkpoint is waited for."""
    waited = []
    monkeypatch.setattr(PathManager, "supports_rename", staticmethod(lambda path: rename))
    monkeypatch.setattr(PathManager, "opena", staticmethod(lambda path, mode: waited.append(path) or open(path, mode)))
    paths = [str(tmp_path / f"{number}.pt") for number in (1, 2)]
    for path in paths:
        checkpoint_utils.torch_persistent_save(complete({}), path, async_write=True)
    assert waited == paths[1:] and loads == [paths[0] + (".tmp" if rename else "")]
    assert sorted(map(str, tmp_path.iterdir())) == paths


def test_reading_back_takes_no_memory(tmp_path):
    program = textwrap.dedent("""
        import resource, sys
        import torch, fairseq_adaptive
        from fairseq import checkpoint_utils
        weights = {str(number): torch.ones(2**20) for number in range(100)}
        state = {"args": None, "cfg": None, "model": weights, "optimizer_history": [
            {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 1}],
            "extra_state": {"train_iterator": {"epoch": 1}}}
        torch.save({"weight": torch.ones(1)}, sys.argv[1] + "/first.pt")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        checkpoint_utils.torch_persistent_save(state, sys.argv[1] + "/checkpoint.pt")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """)
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # MiB, of 400


def test_the_state_of_the_training_is_left_alone(complete, tmp_path):
    """What a task gives for a checkpoint may be what it works with."""
    live = {"counts": np.array([1, 2]), "best": [np.float64(0.5), (np.int64(3), {np.int32(1): np.array(2.5)})]}
    before = repr(live)
    checkpoint_utils.torch_persistent_save(complete(live), str(tmp_path / "a.pt"))
    assert repr(live) == before
    torch.load(tmp_path / "a.pt", weights_only=True)


def test_command_stops_at_its_first_checkpoint(tmp_path):
    """A task of the user's own puts a date into every checkpoint."""
    data = tiny_translation_data(tmp_path / "data", n_train=40)
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(
        textwrap.dedent(f"""
        import datetime, sys
        sys.path.insert(0, {str(USER_DIR.rpartition("/")[0])!r})
        import fairseq_adaptive.plugin
        from fairseq.tasks import register_task
        from fairseq.tasks.translation import TranslationConfig, TranslationTask

        @register_task("dated_translation", dataclass=TranslationConfig)
        class DatedTranslation(TranslationTask):
            def get_checkpoint_dict(self):
                return {{"DatedTranslation": {{"started": [datetime.date(2026, 1, 1)]}}}}
    """)
    )
    done = run(
        "fairseq-train",
        data,
        "--user-dir",
        plugin,
        "--task",
        "dated_translation",
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
        tmp_path / "ck",
        "--max-update",
        "4",
        "--save-interval-updates",
        "1",
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(errors) == 1, done.stderr
    assert "checkpoint_1_1.pt: extra_state.DatedTranslation.started[0] holds datetime.date" in errors[0]
    assert not list((tmp_path / "ck").iterdir())
