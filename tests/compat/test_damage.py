"""A checkpoint whose bytes are not those that were written is not loaded, and the newest whole one is named."""

import os
import random
import shutil

import pytest
import torch
from compat.same import differences
from fairseq import checkpoint_utils

from fairseq_adaptive.compat.damage import damage, newest_whole
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.averaging import average_checkpoints
from fairseq_adaptive.interop.conversion import _read_bin


@pytest.fixture
def folder(complete, tmp_path):
    """checkpoint1.pt to checkpoint3.pt and checkpoint_last.pt, the newest last."""
    for number in range(1, 4):
        state = {**complete({"number": number}), "model": {"weight": torch.randn(300), "other": torch.ones(7)}}
        checkpoint_utils.torch_persistent_save(state, str(tmp_path / f"checkpoint{number}.pt"))
        os.utime(tmp_path / f"checkpoint{number}.pt", (number, number))
    shutil.copy(tmp_path / "checkpoint3.pt", tmp_path / "checkpoint_last.pt")
    return tmp_path


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def place_of_weights(path):
    weights = torch.load(path, weights_only=True)["model"]["weight"]
    return path.read_bytes().index(weights.numpy().tobytes()) + 400


def test_any_flipped_bit_is_noticed_or_changes_nothing(folder):
    path, rng = folder / "checkpoint_last.pt", random.Random(1)
    whole, noticed = path.read_bytes(), 0
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    for _ in range(120):
        flip(path, rng.randrange(len(whole)), rng.randrange(8))
        try:
            assert differences(checkpoint_utils.load_checkpoint_to_cpu(str(path)), state, "state") == []
        except UsageError as error:
            noticed += 1
            assert "_last.pt cannot be read: " in str(error) and "checkpoint3.pt: copy it to checkpoint_last" in str(
                error
            )
        path.write_bytes(whole)
    assert noticed > 40  # the rest is padding between the parts, and names that nobody reads


def test_flipped_weights_load_without_the_check(folder):
    """torch itself says nothing: were it to, the check could go."""
    path = folder / "checkpoint_last.pt"
    before = torch.load(path, weights_only=True)["model"]["weight"]
    flip(path, place_of_weights(path), 6)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], before)
    with pytest.raises(UsageError, match="the bytes of data/[01] in it are not those that were written"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_the_newest_whole_one_is_named(folder):
    last, third, second = folder / "checkpoint_last.pt", folder / "checkpoint3.pt", folder / "checkpoint2.pt"
    last.write_bytes(last.read_bytes()[:1000])
    flip(third, place_of_weights(third))
    (folder / "checkpoint9-shard0.pt").write_bytes(second.read_bytes())  # a part of another checkpoint
    (folder / "checkpoint8.pt").write_text("no checkpoint")
    with pytest.raises(
        UsageError, match=r"_last.pt cannot be read: it is cut short; the newest whole one is \S+/check\w+2.pt: "
    ):
        checkpoint_utils.load_checkpoint_to_cpu(str(last))
    assert newest_whole(third) == str(second)
    with pytest.raises(UsageError, match=r"checkpoint3.pt cannot be read: .* beside it is \S+/checkpoint2.pt$"):
        checkpoint_utils.load_checkpoint_to_cpu(str(third))
    for path in folder.glob("checkpoint[12].pt"):
        path.unlink()
    with pytest.raises(UsageError, match="take another checkpoint"):
        checkpoint_utils.load_checkpoint_to_cpu(str(last))


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 5000], ids=["empty", "text", "zeros"])
def test_what_is_no_zip_file_names_it_too(content, folder):
    (folder / "checkpoint_last.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"the newest whole one is \S+/checkpoint3.pt"):
        checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last.pt"))


@pytest.mark.parametrize("kind", ["old format", "no checksums"])
def test_files_without_checksums_load(kind, complete, tmp_path):
    path = tmp_path / "a.pt"
    if kind == "old format":
        torch.save(complete({"a": torch.ones(3)}), path, _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(complete({"a": torch.ones(3)}), path)
        finally:
            torch.serialization.set_crc32_options(True)
    assert damage(path) is None
    assert torch.equal(checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]["a"], torch.ones(3))


def test_all_who_read_files_of_torch_notice(folder):
    path = folder / "checkpoint3.pt"
    torch.save({"weight": torch.arange(900.0)}, folder / "pytorch_model.bin")
    flip(
        folder / "pytorch_model.bin",
        (folder / "pytorch_model.bin").read_bytes().index(torch.arange(90.0).numpy().tobytes()),
    )
    with pytest.raises(UsageError, match="pytorch_model.bin is damaged: the bytes of data/0"):
        _read_bin(folder / "pytorch_model.bin")
    flip(path, place_of_weights(path))
    with pytest.raises(UsageError, match="checkpoint3.pt cannot be read"):
        average_checkpoints([str(path)])


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_told(folder):
    (folder / "checkpoint3.pt").chmod(0)
    with pytest.raises(UsageError, match="checkpoint3.pt cannot be read: Permission denied"):
        checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint3.pt"))
