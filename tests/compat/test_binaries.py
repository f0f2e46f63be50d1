"""Damaged data, dictionaries and checkpoints end every command with one line, with stock models, too."""

import shutil
import struct

import numpy as np
import pytest
import torch
from cli.helpers import call
from fairseq.data import Dictionary, data_utils, indexed_dataset
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from families import FAMILIES, build_trainer, train, write_data
from pairwise import all_cases, pairwise

from fairseq_adaptive.criterions.distillation import Teacher
from fairseq_adaptive.errors import UsageError

TRANSFORMER = (
    "--task translation -s src -t tgt --arch transformer --share-all-embeddings --encoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --encoder-layers 1 --decoder-embed-dim 16 "
    "--decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --decoder-layers 1 --batch-size 50"
)
LANGUAGE_MODEL = (
    "--task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 "
    "--batch-size 10 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --tokens-per-sample 24"
)
MODELS = {
    "stock": ("pairs", TRANSFORMER),
    "stock_lm": ("text", LANGUAGE_MODEL),
    **{name: FAMILIES[name] for name in FAMILIES if FAMILIES[name].data in ("pairs", "text", "labels")},
}
# one of each task
COMMANDS = [("train", name) for name in ("stock", "stock_lm", "par_transformer_xl", "transkimmer", "albert_act")] + [
    ("generate", "stock"),
    ("generate", "shared_transformer"),
    ("validate", "stock"),
    ("validate", "shared_transformer"),
    ("eval-lm", "stock_lm"),
    ("eval-lm", "shared_transformer_lm"),
]
EVALUATIONS = COMMANDS[-6:]


def meetings(commands, faults):
    """Commands, models and faults: every two of a command, a kind of data and a fault meet; the models that have the data
    take turns."""
    kinds = {}
    for command, name in commands:
        kinds.setdefault((command, MODELS[name][0]), []).append(name)
    found = pairwise([(*kind, fault) for kind in kinds for fault in faults])
    for number, (*kind, fault) in enumerate(found):
        names = kinds[tuple(kind)]
        for name in names if all_cases() else [names[number % len(names)]]:
            yield pytest.param(kind[0], name, fault, id=f"{kind[0]} {name}-{fault}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    checkpoints = {}

    def trained(name):
        if name not in checkpoints:
            save_dir = tmp_path_factory.mktemp(name)
            run("train", name, data, save_dir, "--disable-validation")
            checkpoints[name] = save_dir / "checkpoint_last.pt"
        return checkpoints[name]

    return trained


def run(command, name, data, path, *more):
    """``path`` is the folder to train in, or the checkpoint to evaluate."""
    folder, flags = MODELS[name]
    flags = flags.split()
    if command == "train":
        flags += [
            "--optimizer",
            "adam",
            "--lr",
            "0.001",
            "--save-dir",
            path,
            "--no-epoch-checkpoints",
            "--valid-subset",
            "train",
            "--max-update",
            1,
        ]
    else:
        task = flags[flags.index("--task") + 1]
        flags = ["--task", task, "--path", path, "--batch-size", 50]
        flags += ["--valid-subset" if command == "validate" else "--gen-subset", "train"]
    return call(f"fairseq-{command}", data / folder, *flags, "--cpu", "--num-workers", 0, *more)


@pytest.fixture
def copy(data, tmp_path):
    """``copy(name)``: the data of a model, to be damaged, and the files of its binarised split."""

    def copy(name):
        folder = MODELS[name][0]
        shutil.copytree(data / folder, tmp_path / "data" / folder)
        return tmp_path / "data", sorted(path for path in (tmp_path / "data" / folder).rglob("train*.idx"))

    return copy


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def other_type(path):
    path.write_bytes(path.read_bytes()[:17] + struct.pack("<B", 4) + path.read_bytes()[18:])


def unknown_type(path):
    path.write_bytes(path.read_bytes()[:17] + struct.pack("<B", 77) + path.read_bytes()[18:])


def no_sentence(path):
    builder = MMapIndexedDatasetBuilder(str(path.with_suffix(".bin")), dtype=np.uint16)
    builder.finalize(str(path))


def unknown_tokens(path):
    builder = MMapIndexedDatasetBuilder(str(path.with_suffix(".bin")), dtype=np.uint16)
    for _ in range(20):
        builder.add_item(torch.tensor([5, 60000, 2]))
    builder.finalize(str(path))


DAMAGES = {
    "cut index": (cut, ".idx", "is not as long as"),
    "cut data": (cut, ".bin", "by the index the data have"),
    "empty index": (empty, ".idx", "the index is empty"),
    "empty data": (empty, ".bin", "and they have 0"),
    "other type": (other_type, ".idx", "by the index the data have"),
    "unknown type": (unknown_type, ".idx", "type 77"),
    "no sentence": (no_sentence, ".idx", "has no sentence"),
    "other dictionary": (unknown_tokens, ".idx", "token number 60,000, and the dictionary .* entries"),
}


@pytest.mark.parametrize("command,name,damage", meetings(COMMANDS, DAMAGES))
def test_damaged_data(command, name, damage, copy, trained, tmp_path):
    data, indices = copy(name)
    mend, ending, said = DAMAGES[damage]
    mend(indices[0].with_suffix(ending))
    with pytest.raises(UsageError, match=rf"{indices[0].with_suffix('')}.*{said}"):
        run(command, name, data, tmp_path if command == "train" else trained(name))


def test_whole_data_are_taken(trained, data):
    for command, name in EVALUATIONS:
        run(command, name, data, trained(name))


def test_sentences_of_several_files_are_checked(data, tmp_path):
    for ending in "idx", "bin":
        for number in "", "1":
            shutil.copy(data / "text" / f"train.{ending}", tmp_path / f"train{number}.{ending}")
    dictionary = Dictionary.load(str(data / "text" / "dict.txt"))
    assert len(data_utils.load_indexed_dataset(str(tmp_path / "train"), dictionary, combine=True)) == 1200
    unknown_tokens(tmp_path / "train1.idx")
    with pytest.raises(UsageError, match="token number 60,000"):
        data_utils.load_indexed_dataset(str(tmp_path / "train"), dictionary, combine=True)


def test_former_format_is_read_and_refused_by_name(tmp_path):
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "old.bin"))
    builder.add_item(torch.tensor([5, 6, 2]))
    builder.finalize(str(tmp_path / "old.idx"))
    assert data_utils.load_indexed_dataset(str(tmp_path / "old"), dataset_impl="lazy")[0].tolist() == [5, 6, 2]
    with pytest.raises(UsageError, match="of another kind"):
        data_utils.load_indexed_dataset(str(tmp_path / "old"), dataset_impl="mmap")


DICTIONARIES = {
    "empty": (b"", "is empty"),
    "doubled": (b"one 1\ntwo 1\none 1\n", "has the word 'one' twice"),
    "Latin-1": ("fa\xe7ade 1\n".encode("latin-1"), "is not UTF-8"),
    "no count": (b"one\n", "a line is a word and its count"),
    "absent": (None, "there is no dictionary"),
}


@pytest.mark.parametrize("command,name,kind", meetings(COMMANDS, DICTIONARIES))
def test_wrong_dictionary(command, name, kind, copy, trained, tmp_path):
    data, _ = copy(name)
    content, said = DICTIONARIES[kind]
    path = sorted((data / MODELS[name][0]).rglob("dict*.txt"))[0]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{path}.*{said}" if content is not None else f"{said} {path}"):
        run(command, name, data, tmp_path if command == "train" else trained(name))


@pytest.mark.parametrize(
    "command,name,kind",
    meetings(EVALUATIONS, ("absent", "folder", "text", "weights alone", "list", "other dictionary")),
)
def test_wrong_checkpoint(command, name, kind, data, copy, trained, tmp_path):
    path, said = tmp_path / "a.pt", "is no checkpoint of fairseq"
    if kind == "absent":
        said = "does not exist"
    elif kind == "folder":
        path.mkdir()
        said = "is a folder"
    elif kind == "text":
        path.write_text("no checkpoint")
        said = "cannot be read"
    elif kind == "weights alone":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        path, said = trained(name), "(does not fit|: the checkpoint is of another architecture).*size mismatch"
        data, _ = copy(name)
        for each in (data / MODELS[name][0]).glob("dict*.txt"):
            each.write_text(each.read_text() + "".join(f"more{number} 1\n" for number in range(16)))
    with pytest.raises(UsageError, match=f"{path} ?{said}"):
        run(command, name, data, path)


def test_teacher_of_another_task(data, trained, tmp_path):
    trainer, batches = build_trainer("transkimmer", data)
    with pytest.raises(UsageError, match="--distill-from .*none.pt does not exist"):
        Teacher(str(tmp_path / "none.pt"), trainer.task)
    with pytest.raises(UsageError, match="the teacher was trained with --task translation; train one on the same task"):
        Teacher(str(trained("stock")), trainer.task)
    train(trainer, batches, 1)
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(tmp_path / "a.pt"), {"train_iterator": {"epoch": 1, "version": 2}})
    assert Teacher(str(tmp_path / "a.pt"), trainer.task)._model.training is False
