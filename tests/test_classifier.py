"""Raw text to labels: what is read, what comes out, which tokens were skimmed where."""

import functools
import runpy
import sys
from pathlib import Path

import pytest
import torch
from fairseq import tasks
from omegaconf import OmegaConf

from fairseq_adaptive.commands import predict
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import TranskimmerClassifier
from fairseq_adaptive.interop.checkpoint import load_model, save_checkpoint
from fairseq_adaptive.interop.conversion import new_state
from fairseq_adaptive.modules import recording
from fairseq_adaptive.report.shading import legend, to_html, to_text
from pages import run_python
from threads import assert_threads_equal_one

pytest.importorskip("tokenizers")
WORDS = "good bad film was the a story , . it never works plot ##s".split()
FLAGS = (
    "--task sentence_prediction --criterion sentence_prediction --init-token 0 --max-positions 16 --skim-bias 0 "
    "--arch transkimmer_bert_base --encoder-layers 3 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--encoder-attention-heads 2"
).split()
STACK = "encoder.sentence_encoder.layers"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    lines = {
        "vocab.txt": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS],
        "input0/dict.txt": [f"{word} 1" for word in ["<mask>", *WORDS]],
        "label/dict.txt": ["positive 2", "negative 1"],
    }
    for name, content in lines.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(content) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """``checkpoint(flags ..., classes=2)``: of a model with random weights."""

    @functools.cache
    def checkpoint(*flags, classes=2):
        state = new_state([*FLAGS, "--num-classes", classes, *flags], {})
        state["cfg"]["task"]["data"] = str(data)
        cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        torch.manual_seed(3)
        model = tasks.setup_task(cfg.task).build_model(cfg.model)
        for name, weight in model.named_parameters():
            if ".router." in name or "out_proj" in name:
                torch.nn.init.normal_(weight)
        if "--no-skimming" not in flags:
            for depth, bias in enumerate((3.0, 5.0, -8.0)):  # so that more than one layer skims some
                model.encoder.sentence_encoder.layers.router[depth][4].bias.data[1] += bias
        state["model"] = model.state_dict()
        path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
        save_checkpoint(state, path)
        return path

    return checkpoint


@pytest.fixture
def classifier(checkpoint):
    """``classifier(flags ..., max_length=8 ...)``: what was read back from it."""

    def classifier(*flags, classes=2, **kwargs):
        return TranskimmerClassifier.from_pretrained(checkpoint(*flags, classes=classes), device="cpu", **kwargs)

    return classifier


TEXTS = ["a good story", "the film never works , it was bad .", "", "a bad plot , bad films ."]


def test_what_the_model_says(classifier):
    made = classifier()
    found = made.predict(TEXTS, batch_size=3)
    assert made.predict(iter(TEXTS), batch_size=1)[1].skimmed == found[1].skimmed
    layers = set()
    for text, each in zip(TEXTS, found):
        pieces = text.replace("films", "film ##s").split()
        assert each.tokens == ["<s>", *pieces, "</s>"]
        tokens = torch.tensor([[made.task.source_dictionary.index(piece) for piece in each.tokens]])
        with recording(made.model) as traces, torch.no_grad():
            logits, _ = made.model(tokens, features_only=True, classification_head_name="sentence_classification_head")
        probabilities = dict(zip(["positive", "negative"], logits.softmax(-1)[0].tolist()))
        assert each.probabilities == pytest.approx(probabilities, abs=1e-5)
        assert each.label == max(probabilities, key=probabilities.get) == next(iter(each.probabilities))
        updates = traces[STACK][0].updates[0].tolist()
        assert [3 if layer is None else layer - 1 for layer in each.skimmed] == updates
        assert each.skimmed[0] is None
        layers.update(each.skimmed)
    assert {None, 1, 3} <= layers


def test_the_pages_say_how(checkpoint, adatape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = run_python("docs/hub.md", "from_pretrained", checkpoint())
    assert found["model"].trace and (tmp_path / "FOLDER" / "config.json").exists()
    (tmp_path / "FOLDER").rename(tmp_path / "first")
    run_python("README.md", "hub", checkpoint())
    assert (tmp_path / "FOLDER" / "model.safetensors").exists()
    found = run_python("examples/classification/README.md", "probabilities", checkpoint())["found"]
    assert len(found.tokens) == len(found.skimmed)
    run_python("examples/adatape/README.md", "prediction.tape", adatape(read=False))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_text_as_written(classifier):
    (found,) = classifier().predict("The  Films, good😀!")
    assert found.tokens == ["<s>", "the", "film", "##s", ",", "[UNK]", "[UNK]", "</s>"]
    assert "".join(found.sentence.tokens[1:-1]) == "▁The▁Films,▁good😀!"
    line = to_text(found.sentence, colour=False).split()
    names = ["kept" if layer is None else str(layer) for layer in found.skimmed]
    assert [each.rpartition("/")[2] for each in line] == names
    page = to_html([found.sentence], "Skimmed")
    assert ">skimmed before layer: <i class=d1>" in page and "> kept </i>" in page and "Film" in page
    assert f"<b>{found.label}</b><small>{found.probabilities[found.label]:.3f}</small>" in page
    scale = legend(found.sentence.limit, found.sentence.measure, found.sentence.last)
    assert scale.startswith("skimmed before layer: ") and scale.count("\033[0m") == 4 and " kept " in scale


def test_pairs_and_long_texts(classifier):
    made = classifier(max_length=8)
    (found,) = made.predict([("a good film", "it was")])
    assert found.tokens == ["<s>", "a", "good", "film", "</s>", "it", "was", "</s>"]
    (cut,) = made.predict([("a good film , it works", "it was")])
    assert cut.tokens == found.tokens and cut.probabilities == pytest.approx(found.probabilities)
    made.task.cfg.separator_token = 2
    (roberta,) = TranskimmerClassifier(made.model, made.task, made._tokenizer).predict([("a good film", "it was")])
    assert roberta.tokens == ["<s>", "a", "good", "film", "</s>", "</s>", "it", "was", "</s>"]
    (longest,) = classifier().predict(["good " * 50])
    assert len(longest.tokens) == 16


def test_all_skimmed_none_skimmed_nothing_to_skim(classifier):
    made = classifier()
    with torch.no_grad():
        made.model.encoder.sentence_encoder.layers.router[0][4].bias.copy_(torch.tensor([1e4, -1e4]))
    for each in made.predict(TEXTS):
        assert each.skimmed == [None, *[1] * (len(each.tokens) - 1)] and sum(each.probabilities.values()) > 0.99
    for each in classifier("--no-skimming").predict(TEXTS):
        assert set(each.skimmed) == {None}
    assert made.predict([]) == []


def test_regression(classifier):
    made = classifier("--regression-target", classes=1)
    first, second = made.predict(TEXTS[:2])
    assert isinstance(first.label, float) and first.label != second.label and first.probabilities == {}


def test_errors(classifier, data, tmp_path):
    state = new_state(["--task", "masked_lm", *FLAGS[8:]], {"weight": torch.zeros(1)})
    save_checkpoint(state, tmp_path / "masked.pt")
    with pytest.raises(UsageError, match="trained with --task masked_lm, not sentence_prediction"):
        TranskimmerClassifier.from_pretrained(tmp_path / "masked.pt")
    with pytest.raises(UsageError, match="there is no .*input0/dict.txt: name the folder"):
        classifier(data=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nun\n##deux\ngood\n")
    with pytest.raises(UsageError, match="is not that of the model: 7 of its 8 pieces"):
        classifier(tokenizer=tmp_path / "other")
    with pytest.raises(UsageError, match="there is neither vocab.txt"):
        classifier(tokenizer=tmp_path)
    with pytest.raises(UsageError, match="a length of 3 is impossible"):
        classifier(max_length=3)
    for wrong in ([3], [("a", "b", "c")], [()]):
        with pytest.raises((UsageError, TypeError)):
            classifier().predict(wrong)


def test_command_says_a_line_for_each_line(checkpoint, tmp_path, monkeypatch, capsys):
    """Blank lines are texts, and only a line feed ends one."""
    (tmp_path / "text").write_bytes("good film\n\nbad\rplot\r\n \x1b[31mgood\u202e\n".encode())
    script = Path(__file__).resolve().parents[1] / "scripts" / "predict.py"
    monkeypatch.setattr(
        sys,
        "argv",
        ["predict.py", str(checkpoint()), "--input", str(tmp_path / "text"), "--html", str(tmp_path / "page.html")],
    )
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    lines = said.removesuffix("\n").split("\n")
    assert len(lines) == 4 and all(line.split("\t")[0] in ("positive", "negative") for line in lines)
    assert "good/" in lines[0] and "good/" not in lines[1] and "plot/" in lines[2] and "good" in lines[3]
    assert "\x1b" not in said and "\u202e" not in said
    assert (tmp_path / "page.html").read_text().count("<p class=") == 5  # and the scale


@pytest.mark.parametrize("size", (0, -1))
def test_batches_of_nothing_are_refused(checkpoint, size):
    with pytest.raises(UsageError, match="batch_size is"):
        TranskimmerClassifier.from_pretrained(checkpoint()).predict(["good"], size)


def test_serves_several_threads(classifier):
    def same(one, other):
        return [(each.label, each.skimmed, each.tokens) for each in one] == [
            (each.label, each.skimmed, each.tokens) for each in other
        ]

    assert_threads_equal_one(classifier().predict, [TEXTS, TEXTS[:1] * 3, TEXTS[1:2], TEXTS[3:]], same)


ADATAPE = (
    "--task sentence_prediction --max-positions 16 --init-token 0 --num-classes 2 --arch adatape_tiny --encoder-layers 3 "
    "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --tape-tokens 6 --tape-threshold 2 "
    "--criterion tape_ponder_loss"
)


@pytest.fixture(scope="module")
def adatape(data, tmp_path_factory):
    """``adatape(flags ...)``: a classifier of a model with a tape and random weights, or its file."""

    def adatape(*flags, read=True):
        state = new_state([*ADATAPE.split(), *flags], {})
        state["cfg"]["task"]["data"] = str(data)
        cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        torch.manual_seed(3)
        model = tasks.setup_task(cfg.task).build_model(cfg.model)
        for name, weight in model.named_parameters():
            if name.endswith("tape.reader.norm.weight"):
                weight.data *= 2.5  # more certain, some more than others
        state["model"] = model.state_dict()
        path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
        save_checkpoint(state, path)
        return TranskimmerClassifier.from_pretrained(path, device="cpu") if read else path

    return adatape


@pytest.mark.parametrize("flags", ("", "--tape-layer 1", "--tape-layer 0 --halting act", "--tape-layer 0 --skimming"))
def test_tells_the_length_of_the_tape(adatape, flags):
    classifier = adatape(*flags.split())
    together, alone = (classifier.predict(TEXTS, batch_size=size) for size in (4, 1))
    lengths = [each.tape for each in together]
    assert lengths == [each.tape for each in alone] and len(set(lengths)) > 1
    assert all(0 < length <= 6 for length in lengths)
    assert all(len(each.tokens) == len(each.updates) == len(each.sentence.tokens) for each in together)
    (text,) = classifier.predict(TEXTS[:1])
    with recording(classifier.model) as traces, torch.no_grad():
        tokens = torch.tensor([[classifier.task.source_dictionary.index(each) for each in text.tokens]])
        classifier.model(tokens, features_only=True, classification_head_name="sentence_classification_head")
    assert text.tape == int(traces[STACK][0].tape_len[0])


def test_without_a_tape_there_is_no_length(adatape, classifier):
    assert adatape("--tape-tokens", "0").predict(TEXTS)[0].tape is None
    assert classifier().predict(TEXTS)[0].tape is None


def test_a_tape_serves_several_threads(adatape):
    def same(one, other):
        return [(each.tape, each.probabilities) for each in one] == [(each.tape, each.probabilities) for each in other]

    assert_threads_equal_one(adatape().predict, [TEXTS, TEXTS[:1] * 3, TEXTS[1:2], TEXTS[3:]], same, times=5)


def test_int8(checkpoint, classifier, data, tmp_path, monkeypatch, capsys):
    """By the argument, by the flag of the command, and by an override as fairseq-validate takes it."""
    plain, made = classifier(), classifier(int8=True)
    assert made.model.maps_in_int8 and not any("Int8" in type(each).__name__ for each in plain.model.modules())
    expected, found = plain.predict(TEXTS), made.predict(TEXTS)
    for one, other in zip(expected, found):
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.1) and one.tokens == other.tokens
    assert [each.probabilities for each in expected] != [each.probabilities for each in found]

    (tmp_path / "text").write_text("\n".join(TEXTS) + "\n")
    predict.main([str(checkpoint()), "--input", str(tmp_path / "text"), "--int8"])
    said = [line.split("\t") for line in capsys.readouterr().out.removesuffix("\n").split("\n")]
    assert [(label, chance) for label, chance, _ in said] == [
        (each.label, f"{each.probabilities[each.label]:.3f}") for each in found
    ]

    model, _ = load_model(checkpoint(), {"int8": True, "data": str(data)})
    assert model.maps_in_int8 == made.model.maps_in_int8
    assert not hasattr(load_model(checkpoint(), {"data": str(data)})[0], "maps_in_int8")


def test_int8_is_for_a_cpu(checkpoint):
    with pytest.raises(UsageError, match="int8 runs on a CPU, and this model is on meta: use --cpu, or leave int8 out"):
        TranskimmerClassifier.from_pretrained(checkpoint(), device="meta", int8=True)
