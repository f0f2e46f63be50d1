"""One front door for all families: what a model says, its trace, its picture, and the folder that it is saved to."""

import functools
import json
import pickle

import numpy as np
import pytest
import torch
from families import build_trainer, train, write_data

from fairseq_adaptive import hub
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.encoder import Encoder
from fairseq_adaptive.hub.plain import load_plain
from fairseq_adaptive.interop.checkpoint import load_trained
from fairseq_adaptive.modules import recording
from fairseq_adaptive.report.depth_map import Sentence

SENTENCES = ["w01 w02 w03 w04", "w05", "w06 w07 w08 w09 w10 w11"]
MADE = (
    "skimming_decoder",
    "shared_transformer_lm",
    "halting_transformer_xl",
    "albert_act",
    "adatape_parity",
    "adatape_vit",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(family)``: a file."""
    data = write_data(tmp_path_factory.mktemp("data"))

    @functools.cache
    def checkpoint(family):
        trainer, batches = build_trainer(family, data, "--max-update", "5")
        train(trainer, batches, 2)
        path = data / f"{family}.pt"
        trainer._gathered_optim_state = None
        trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
        return path

    return checkpoint


@pytest.fixture(scope="module")
def made(checkpoint):
    """``made(family)``: what the hub makes of it."""
    return functools.cache(lambda family: hub.from_pretrained(checkpoint(family), device="cpu"))


def says(model):
    """The numbers that a model says of some inputs, and what its method returned."""
    if isinstance(model, hub.Translator):
        texts = model.translate(SENTENCES, beam=2, max_len_b=8)
        return [each.total for each in model.score(SENTENCES, texts)], texts
    if isinstance(model, hub.LanguageModel):
        texts = model.sample(SENTENCES, length=3, topk=1)
        return [each.total for each in model.score(texts)], texts
    if isinstance(model, hub.MaskedLanguageModel):
        found = model.predict(["w01 <mask> w03", "<mask> w02 <mask> w05"], best=2)
        return [chance for gaps in found for gap in gaps for _, chance in gap.words], found
    if isinstance(model, hub.ImageClassifier):
        images = np.random.default_rng(1).integers(0, 255, (3, 8, 8)).astype(np.uint8)
        found = model.predict(images, batch_size=2)
    else:
        found = model.predict([[1, 0, -1, 1] * 2, [1, 0] * 4, [0] * 8], batch_size=2)
    return [each.probabilities[each.label] for each in found], found


@pytest.mark.parametrize("family", MADE)
def test_every_family_has_one_shape(family, made, tmp_path):
    model = made(family)
    assert model.trace == {}
    before, said = says(model)
    assert all(map(np.isfinite, before)) and len(said) in (2, 3)
    trace = model.trace
    assert set(trace) and all(
        name.endswith(("layers", "blocks")) and each.updates.shape[0] >= 1 for name, each in trace.items()
    )
    page = model._repr_html_()
    assert type(model).__name__ in page and ("tape tokens" in page) == family.startswith("adatape")
    assert family.startswith("adatape") or "<i class=d" in page
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert str(tmp_path.parent) not in text and json.loads(text)["task"] == model.origin.task
    again = hub.from_pretrained(tmp_path / "saved", device="cpu")
    assert type(again) is type(model)
    after, texts = says(again)
    assert after == pytest.approx(before, abs=1e-6)
    assert not isinstance(texts[0], str) or texts == said
    with pytest.raises(UsageError, match="exists"):
        model.save_pretrained(tmp_path / "saved")


def test_scores_are_those_of_the_model(made):
    """Of a text alone, by hand."""
    model = made("shared_transformer_lm")
    (found,) = model.score(["w01 w02"])
    words, ids = model.task.source_dictionary, model.encode("w01 w02")["input_ids"]
    with torch.no_grad():
        out = model.model(torch.cat((torch.full((1, 1), words.eos()), ids[:, :-1]), 1))
        scores = model.model.get_normalized_probs(out, log_probs=True, sample={"target": ids})
    assert found.tokens == ["w01", "w02", "</s>"]
    assert found.log_probabilities == pytest.approx(scores[0].gather(1, ids[0][:, None])[:, 0].tolist(), abs=1e-6)
    assert model.score(SENTENCES)[0].total == pytest.approx(model.score(SENTENCES[0]).total, abs=1e-5)


def test_the_trace_is_that_of_a_plain_call(made):
    model = made("skimming_decoder")
    text = model.translate(SENTENCES[0], beam=2, max_len_b=8)
    source = model.encode(SENTENCES[0])["input_ids"]
    target = model.task.target_dictionary.encode_line(text, add_if_not_exist=False)[None].long()
    before = torch.cat((target[:, -1:], target[:, :-1]), 1)
    with recording(model.model) as traces, torch.no_grad():
        model.model(source, src_lengths=torch.tensor([source.size(1)]), prev_output_tokens=before)
    for name, trace in model.trace.items():
        assert torch.equal(trace.updates, traces[name][0].updates)


def test_languages_that_were_inferred_from_the_data(checkpoint, made, tmp_path):
    """As fairseq-train without -s and -t does, from names of files that a saved folder does not have."""
    state = torch.load(checkpoint("skimming_decoder"), weights_only=False)
    state["cfg"]["task"].update(source_lang=None, target_lang=None)
    torch.save(state, tmp_path / "inferred.pt")
    hub.from_pretrained(tmp_path / "inferred.pt", device="cpu").save_pretrained(tmp_path / "saved")
    again = hub.from_pretrained(tmp_path / "saved", device="cpu")
    assert says(again) == says(made("skimming_decoder"))


def test_samples_by_seed(made):
    model = made("halting_transformer_xl")
    first = model.sample("w01", length=5, seed=1)
    assert first == model.sample("w01", length=5, seed=1) and first.startswith("w01")
    assert len({model.sample("w01", length=5, seed=seed) for seed in range(5)}) > 1


def test_pictures_escape_text(made):
    model = made("shared_transformer_lm")
    model.score("<script>alert(1)</script>")
    assert "<unk>" not in model._repr_html_() and "&lt;unk&gt;" in model._repr_html_()
    model._show([Sentence(["<script>x</script>"], [1], 2)])
    assert "<script>" not in model._repr_html_() and "&lt;script&gt;" in model._repr_html_()


def test_the_encoder_in_plain_torch(made, tmp_path):
    """Same states as fairseq's, and the same tokens computed; of a model with a tape, a router and a halting rule."""
    model = made("skimming_decoder")
    model.save_pretrained(tmp_path / "saved")
    encoder = Encoder.from_pretrained(tmp_path / "saved")
    states, given = encoder.states(SENTENCES), encoder.encode(SENTENCES)
    assert torch.equal(given["input_ids"], model.encode(SENTENCES)["input_ids"])
    with torch.no_grad(), recording(model.model) as traces:
        out = model.model.encoder(given["input_ids"], src_lengths=given["attention_mask"].sum(1))
    expected = out["encoder_out"][0].transpose(0, 1)[:, : states.size(1)] * given["attention_mask"][..., None]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)
    (trace,) = encoder.trace.values()
    length = states.size(1)
    assert torch.equal(trace.updates[:, :length], traces["encoder.layers"][0].updates[:, :length])
    with pytest.raises(UsageError, match="install fairseq"):
        encoder.translate("w01")
    assert "<i class=d" in encoder._repr_html_()
    alone = encoder.states(SENTENCES[1])
    torch.testing.assert_close(states[1, :2], alone[0], rtol=0, atol=1e-6)


def test_what_plain_torch_refuses(made, tmp_path):
    model = made("halting_transformer_xl")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UsageError, match="par_transformer_xl for segmented_language_modeling, which needs fairseq"):
        load_plain(tmp_path / "saved")
    with pytest.raises(UsageError, match="segmented_language_modeling has no form of fixed shape"):
        model.export_onnx(tmp_path / "model.onnx")
    assert made("skimming_decoder").exportable(counterpart=True)(torch.tensor([[4, 5, 2]])).shape == (1, 3, 32)


def test_damaged_folders(made, tmp_path):
    made("adatape_parity").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    text = path.read_text()
    for damage, said in (
        ({"format": 9}, "this version reads 1"),
        ({"tied": []}, "damaged: tied"),
        ({"architecture": "none_such"}, "none_such, which is unknown"),
        ({"task": "none_such"}, "--task none_such"),
    ):
        path.write_text(json.dumps({**json.loads(text), **damage}))
        with pytest.raises(UsageError, match=said):
            hub.from_pretrained(tmp_path / "saved")


def test_mistakes(made, checkpoint, tmp_path):
    translator, model = made("skimming_decoder"), made("shared_transformer_lm")
    for call, said in (
        (lambda: translator.translate([1]), "1 is no text"),
        (lambda: translator.translate("w01", beam=0), "beam"),
        (lambda: translator.score(["w01"], []), "1 sources and 0 targets"),
        (lambda: model.sample("w01", length=0), "length"),
        (lambda: model.score("w01 " * 50), "24 at most"),
        (lambda: made("adatape_parity").predict([[2]]), "each 1, 0 or -1"),
        (lambda: made("adatape_vit").predict(np.zeros((1, 7, 8), np.uint8)), "give bytes"),
        (lambda: hub.LanguageModel.from_pretrained(checkpoint("skimming_decoder")), "--task translation, not"),
        (lambda: hub.Translator.from_pretrained(checkpoint("skimming_decoder"), bpe="x"), "unknown bpe"),
        (lambda: hub.from_pretrained(tmp_path), "no .*config.json"),
        (lambda: hub.from_pretrained(tmp_path / "absent.pt"), "absent.pt is missing"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    loaded, _, task = load_trained(checkpoint("adatape_parity"))
    with pytest.raises(UsageError, match="from_pretrained"):
        hub.ParityModel(loaded, task).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_pieces_of_words(checkpoint, tmp_path):
    (tmp_path / "codes").write_text("#version: 0.2\nw 0\nw0 1</w>\n")
    options = {"bpe": "subword_nmt", "codes": tmp_path / "codes", "device": "cpu"}
    model = hub.from_pretrained(checkpoint("skimming_decoder"), **options)
    assert model.encode("w01 w02")["input_ids"].shape[1] == 4  # w01 w0@@ 2 </s>
    model.save_pretrained(tmp_path / "saved")
    again = hub.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again.encode("w01 w02")["input_ids"], model.encode("w01 w02")["input_ids"])
    assert pickle.dumps(model.origin)
