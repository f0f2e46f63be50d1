"""fairseq's task sentence_prediction: data that do not fit its flags are refused before work starts."""

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

from fairseq_adaptive.errors import UsageError


def binarise(path, dictionary, lines):
    path.parent.mkdir(exist_ok=True)
    dictionary.save(str(path.parent / "dict.txt"))
    builder = indexed_dataset.make_builder(f"{path}.bin", impl="mmap", vocab_size=len(dictionary))
    for line in lines:
        builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).long())
    builder.finalize(f"{path}.idx")


@pytest.fixture
def task(tmp_path):
    """``task(labels, **flags)``: of 5 texts, the third of 9 tokens with ``</s>``, and with the labels' split loaded."""

    def task(labels=("good", "bad", "good", "bad", "good"), numbers=None, **flags):
        words, names = Dictionary(), Dictionary()
        for word in "a b c".split():
            words.add_symbol(word)
        for name in "good", "bad", "good":
            names.add_symbol(name)
        binarise(tmp_path / "input0" / "train", words, ["a", "a b", "c a b c a b c a", "", "b"])
        if labels is not None:
            binarise(tmp_path / "label" / "train", names, labels)
        if numbers is not None:
            (tmp_path / "label" / "train.label").write_text("".join(f"{number}\n" for number in numbers))
        values = {
            "num_classes": 2,
            "init_token": 0,
            "regression_target": False,
            "classification_head_name": "head",
            "seed": 1,
            **flags,
        }
        made = SentencePredictionTask.setup_task(SentencePredictionConfig(data=str(tmp_path), **values))
        made.load_dataset("train")
        return made

    return task


def test_takes_what_fits(task):
    data = task().dataset("train")
    batch = data.collater([data[number] for number in data.ordered_indices()])
    assert sorted(batch["target"].flatten().tolist()) == [0, 0, 0, 1, 1]
    assert torch.equal(batch["net_input"]["src_tokens"].ne(1).sum(1), batch["net_input"]["src_lengths"])
    assert batch["net_input"]["src_lengths"].min() == 2  # a text without words is <s> </s>


@pytest.mark.parametrize(
    "labels, flags, message",
    [
        (None, {"num_classes": -1}, "--num-classes is missing"),
        (
            ("good",) * 5,
            {"num_classes": 3},
            r"--num-classes 3, but .*dict.txt has 2 labels \(good, bad\): set --num-classes 2",
        ),
        (("good",) * 5, {"num_classes": 1}, "--num-classes 1, but .* set --num-classes 2"),
        (("good", "bad", "so so", "bad", "bad"), {}, "line 3 has 2 labels, not one"),
        (("good", "", "bad", "bad", "bad"), {}, "line 2 has 0 labels, not one"),
        (
            ("good", "bad", "bad", "ugly", "bad"),
            {},
            "the label in line 4 is not in label/dict.txt, which has good, bad:",
        ),
        (("good", "bad"), {}, "split train in .* not equally many"),
        (("good",) * 5, {"numbers": None, "num_classes": 1, "regression_target": True}, "there is no .*train.label"),
        (None, {"numbers": [1, 2, "x", 4, 5], "num_classes": 1, "regression_target": True}, "could not convert .* 'x'"),
        (
            None,
            {"numbers": [1, 2, "3 4", 4, 5], "num_classes": 1, "regression_target": True},
            'on line 2, found: "3 4"',
        ),
        (
            None,
            {"numbers": [1, 2, "nan", 4, 5], "num_classes": 1, "regression_target": True},
            "line 3: nan is no number",
        ),
        (
            None,
            {"numbers": [1, 2, 3], "num_classes": 1, "regression_target": True},
            "split train in .* not equally many",
        ),
    ],
)
def test_refuses_labels(task, labels, flags, message, tmp_path):
    if flags.get("numbers"):
        (tmp_path / "label").mkdir()
    with pytest.raises(UsageError, match=message):
        task(labels, **flags)


def test_refuses_splits_that_are_not_there(task):
    made = task()
    with pytest.raises(UsageError, match="split test in .*: could not find dataset: .*input0/test"):
        made.load_dataset("test")


def test_refuses_long_texts_unless_told_otherwise(task):
    made = task()
    data, indices = made.dataset("train"), np.arange(5)
    with pytest.raises(UsageError, match="1 texts have more than --max-positions 8 tokens, the longest 10: cut them"):
        made.filter_indices_by_size(indices, data, 8)
    left = made.filter_indices_by_size(indices, data, 8, ignore_invalid_inputs=True)
    assert left.tolist() == [0, 1, 3, 4]
    assert made.filter_indices_by_size(indices, data, 10).tolist() == [0, 1, 2, 3, 4]
    cut = task(max_positions=8, shorten_method="truncate")
    assert cut.filter_indices_by_size(indices, cut.dataset("train"), 8).tolist() == [0, 1, 2, 3, 4]


def test_numpy_scores_do_not_spoil_checkpoints(tmp_path):
    state = {"extra_state": {"best": np.float64(81.5), "all": [np.int64(3), {"f1": np.float32(0.5)}]}}
    checkpoint_utils.torch_persistent_save(state, str(tmp_path / "checkpoint.pt"))
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert loaded == {"extra_state": {"best": 81.5, "all": [3, {"f1": 0.5}]}}
