"""A fine-tuned ALBERT-ACT says the label of raw text, split by SentencePiece, and how deep it went at each token."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from fairseq import tasks
from omegaconf import OmegaConf

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import TranskimmerClassifier
from fairseq_adaptive.interop.checkpoint import save_checkpoint
from fairseq_adaptive.interop.conversion import new_state
from fairseq_adaptive.modules import recording

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--task sentence_prediction --criterion sentence_prediction --init-token 0 --num-classes 2 --max-positions 16 "
    "--arch albert_act_tiny --encoder-layers 4 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--encoder-attention-heads 2 --encoder-input-dim 8"
).split()
TEXTS = ["a quick brown fox", "", "the lazy dog jumps"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint with random weights, and the folder of its data with the SentencePiece model."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    folder = tmp_path_factory.mktemp("albert")
    (folder / "text").write_text("the quick brown fox jumps over a lazy dog again and again\n" * 3)
    flags = dict(vocab_size=60, model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "spiece"), **flags)
    spm = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    pieces = [spm.id_to_piece(number) for number in range(3, spm.get_piece_size())]
    for name, words in (("input0", ["<mask>", *pieces]), ("label", ["good", "bad"])):
        (folder / name).mkdir()
        (folder / name / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    state = new_state(FLAGS, {})
    state["cfg"]["task"]["data"] = str(folder)
    cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    torch.manual_seed(3)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    torch.nn.init.normal_(model.encoder.layers.halting.unit.weight)
    state["model"] = model.state_dict()
    save_checkpoint(state, folder / "model.pt")
    return folder


def test_labels_and_depths_are_those_of_the_model(place):
    classifier = TranskimmerClassifier.from_pretrained(place / "model.pt", device="cpu")
    found = classifier.predict(TEXTS, batch_size=2)
    for text, prediction in zip(TEXTS, found):
        assert "".join(prediction.tokens[1:-1]).replace("▁", " ").strip() == text
        tokens = torch.tensor([[classifier.task.source_dictionary.index(token) for token in prediction.tokens]])
        with recording(classifier.model) as traces, torch.no_grad():
            logits = classifier.model(
                tokens, features_only=True, classification_head_name="sentence_classification_head"
            )[0][0]
        assert list(prediction.probabilities.values()) == pytest.approx(sorted(logits.softmax(0).tolist())[::-1])
        assert prediction.updates == traces["encoder.layers"][0].updates[0].tolist()
        assert prediction.sentence.depths == prediction.updates and prediction.sentence.measure == "updates"
        assert prediction.skimmed == [None] * len(prediction.tokens)
    assert len({depth for each in found for depth in each.updates}) > 1


def test_the_tokenizer_may_be_a_file(place, tmp_path):
    found, other = (
        TranskimmerClassifier.from_pretrained(place / "model.pt", tokenizer=tokenizer, device="cpu").predict(TEXTS)
        for tokenizer in (place / "spiece.model", place)
    )
    assert found == other
    with pytest.raises(UsageError, match="neither vocab.txt nor vocab.json"):
        TranskimmerClassifier.from_pretrained(place / "model.pt", tokenizer=tmp_path, device="cpu")


def test_predict(place, monkeypatch, capsys):
    (place / "lines").write_text("\n".join(TEXTS) + "\n")
    command = ["predict.py", place / "model.pt", "--input", place / "lines", "--color", "never"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    runpy.run_path(str(ROOT / "scripts" / "predict.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split("\t")[0] in ("good", "bad") for line in lines)
    shown = lines[0].split("\t")[2].split()
    assert shown[0].startswith("<s>/") and all(1 <= int(each.rpartition("/")[2]) <= 4 for each in shown)


def test_evaluate(place, monkeypatch, capsys):
    for needed in ("scipy", "sklearn"):
        pytest.importorskip(needed)
    (place / "texts").mkdir()
    (place / "texts" / "dev.txt").write_text("good\ta quick brown fox\nbad\tthe lazy dog\n")
    command = ["evaluate.py", "SST-2", place / "texts", "--path", place / "model.pt"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "classification"))
    runpy.run_path(str(ROOT / "examples" / "classification" / "evaluate.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("dev.txt: 2 texts, accuracy ")
