"""Files, streams and numbers that are wrong: each is said in one line, and nothing is lost or overwritten."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_adaptive.command import device, run, wants_colour
from fairseq_adaptive.data.squad import load_tokenizer, read_squad
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, read_lines, whole_file, whole_folder
from fairseq_adaptive.interop import save_checkpoint


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("content", ("[" * 100_000, "{", "", "\x00", "[1, 2]", '"text"', "NaN", "9" * 5000))
def test_json_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match="a.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("value", ("false", "true", 0, 1, None, []))
def test_texts_are_no_truth_values(tmp_path, value):
    entry = {"id": "a", "question": "q", "answers": [], "is_impossible": value}
    article = {"paragraphs": [{"context": "c", "qas": [entry]}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [article]}))
    with pytest.raises(UsageError, match="is_impossible is .*, not true or false"):
        read_squad(tmp_path / "a.json")


@pytest.mark.parametrize("name, content", (("vocab.txt", None), ("vocab.json", "{"), ("vocab.json", "[]")))
def test_damaged_vocabulary(tmp_path, name, content):
    pytest.importorskip("tokenizers")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    if content is None:
        (tmp_path / name).write_bytes(b"\xff\xfe\n")
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="damaged"):
        load_tokenizer(tmp_path, False)


def test_lines_end_with_a_line_feed_only(tmp_path):
    (tmp_path / "a").write_bytes("one\rtwo\n\nthree\r\nfo\u2028ur\u0085 \x0b".encode())
    assert read_lines(tmp_path / "a") == ["one\rtwo", "", "three", "fo\u2028ur\u0085 \x0b"]


@pytest.mark.parametrize("name", ("gpu", "cuda:99", "meta", "", "cpu:x", "xla"))
def test_unknown_devices(name):
    with pytest.raises(Exception, match="there is no device"):
        device(name)
    assert device("cpu") == "cpu"


def test_closed_standard_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        read_lines("-")
    monkeypatch.setattr(sys, "stdout", None)
    assert not wants_colour("auto")
    run(lambda: print("nobody hears it"))


def test_reader_that_went_away():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom fairseq_adaptive.command import run\n"
        "run(lambda: [print('x' * 1000) for _ in range(1000)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 141 and "Traceback" not in errors and "BrokenPipe" not in errors


def _full(path, *unused):
    raise OSError(28, "No space left on device", path)


@pytest.mark.parametrize("made", (whole_file, whole_folder))
def test_full_disk_is_named_and_leaves_nothing(tmp_path, made, monkeypatch):
    with pytest.raises(UsageError, match="cannot write .*/result: No space left on device"):
        with made(tmp_path / "result") as part:
            if made is whole_file:
                Path(part).write_text("half")
            _full(part)
    assert not list(tmp_path.iterdir())


def test_torch_says_a_full_disk_in_its_own_way(tmp_path):
    with pytest.raises(UsageError, match="No space left on device"):
        with whole_file(tmp_path / "result") as part:
            try:
                _full(part)
            except OSError:
                raise RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize("made", (whole_file, whole_folder))
def test_what_is_there_is_whole_and_never_replaced(tmp_path, made):
    with made(tmp_path / "result") as part:
        assert not (tmp_path / "result").exists()
        (Path(part) / "inside" if made is whole_folder else Path(part)).write_text("all")
    path = tmp_path / "result" / "inside" if made is whole_folder else tmp_path / "result"
    assert path.read_text() == "all" and path.stat().st_mode & 0o044
    with pytest.raises(UsageError, match="exists"):
        with made(tmp_path / "result"):
            pass
    with pytest.raises(KeyboardInterrupt):
        with made(tmp_path / "other"):
            raise KeyboardInterrupt
    assert [each.name for each in tmp_path.iterdir()] == ["result"]


def test_ending_of_a_picture_stays(tmp_path):
    with whole_file(tmp_path / "a.PnG") as part:
        assert part.endswith(".PnG")
        Path(part).touch()


def test_save_dir_that_is_a_file_is_refused(tmp_path):
    from fairseq import checkpoint_utils

    (tmp_path / "file").touch()
    for name in ("file", "file/inside"):
        with pytest.raises(UsageError, match="--save-dir .* name a folder"):
            checkpoint_utils.verify_checkpoint_directory(str(tmp_path / name))
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())


def test_sixteen_bits_are_not_white(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from fairseq_adaptive.data.image_files import FolderImages

    (tmp_path / "a").mkdir()
    grey = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    image.fromarray(grey).save(tmp_path / "a" / "grey.png")
    read = np.asarray(FolderImages(str(tmp_path), 3)[0])
    assert read.shape == (2, 3, 3) and (read == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_weights_that_are_not_finite_are_not_converted(value):
    from fairseq_adaptive.interop.conversion import Weights

    with pytest.raises(UsageError, match="NaN or infinity"):
        Weights({"a": torch.tensor([1.0, value])}).take("a", 2)
    with pytest.raises(UsageError, match="type int64"):
        Weights({"a": torch.tensor([1, 2])}).take("a", 2)


STOCK = (
    ("dataset", "batch_size", (0, -1, 10**9)),
    ("dataset", "batch_size_valid", (0, -1)),
    ("dataset", "max_tokens", (0, -5)),
    ("dataset", "num_workers", (-1, 10**6)),
    ("dataset", "required_batch_size_multiple", (0,)),
    ("optimization", "clip_norm", (math.nan, math.inf, -1.0)),
    ("optimization", "max_update", (-1,)),
    ("optimization", "max_epoch", (-1,)),
    ("optimization", "update_freq", ([0], [1, -1])),
    ("optimization", "lr", ([math.nan], [-0.1], [0.1, math.inf])),
    ("checkpoint", "save_interval", (0,)),
    ("common", "log_interval", (0, -1)),
    ("eval_lm", "context_window", (-1,)),
)


@pytest.mark.parametrize(
    "group, name, value", [(group, name, value) for group, name, values in STOCK for value in values]
)
def test_numbers_of_fairseq_are_refused_before_work(group, name, value):
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.distributed import utils as distributed_utils
    from fairseq.trainer import Trainer
    from omegaconf import OmegaConf

    cfg = OmegaConf.structured(FairseqConfig)
    cfg.dataset.num_workers = 1  # the class is shared
    worked = []
    distributed_utils.call_main(cfg, worked.append)
    assert len(worked) == 1
    cfg[group][name] = value
    for call in (lambda: distributed_utils.call_main(cfg, worked.append), lambda: Trainer(cfg, None, None, None)):
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} is .*: use a "):
            call()
    assert len(worked) == 1


def test_messages_do_not_control_the_terminal():
    error = UsageError("the label '\x1b[31m\u202ebad' is unknown\nknown are a")
    assert str(error) == "the label '\\x1b[31m\\u202ebad' is unknown\nknown are a"


@pytest.mark.parametrize("saves", ("torch", "text"))
def test_a_write_that_the_system_refuses(tmp_path, saves):
    """As on a full disk, but for real: no file may grow beyond a limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot write .*/result: File too large; nothing of it was left"):
            if saves == "torch":
                save_checkpoint({"a": torch.zeros(100_000)}, tmp_path / "result")
            else:
                with whole_file(tmp_path / "result") as part:
                    Path(part).write_text("a" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
