"""What the page shows: equal to what the model and the compute report say, and all as it was afterwards."""

import math
import re

import pytest
import torch

from fairseq_adaptive import commands
from fairseq_adaptive.data.subwords import Tokenized
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.explore.dials import Turned, dials_of
from fairseq_adaptive.explore.explorer import Explorer
from fairseq_adaptive.modules.policies import Policy
from fairseq_adaptive.report.costs import Costs, without_policies

TEXT = "w01 w02 w03 w04"


@pytest.fixture(scope="module")
def explorer(place):
    made = {}

    def explorer(name):
        if name not in made:
            made[name] = Explorer(
                place / f"{name}.pt", tokenizer=place / "tok" if name == "transkimmer" else Tokenized()
            )
        return made[name]

    return explorer


def test_label_is_that_of_the_classifier(explorer):
    from fairseq_adaptive.hub import TranskimmerClassifier

    made = explorer("transkimmer")
    assert made.kind == "label" and not made.pairs and "transkimmer_base, policies: skimming" in made.description
    look = made.look(TEXT)
    (said,) = made._classifier.predict([TEXT])
    assert isinstance(made._classifier, TranskimmerClassifier)
    assert look.said == list(said.probabilities.items()) and look.sentences == {"text": said.sentence}
    assert sum(chance for _, chance in look.said) == pytest.approx(1) and look.tape is None
    costs = [Costs(made.model), Costs(made.model)]
    with torch.no_grad():
        costs[0].count(lambda: made._classifier.predict([TEXT]))
        with without_policies(made.model):
            costs[1].count(lambda: made._classifier.predict([TEXT]))
    assert look.macs == tuple(each.total() for each in costs) and min(look.seconds) > 0


def test_translation_and_its_probability(explorer):
    made = explorer("pondernet")
    look = made.look(TEXT, beam=2)
    assert made.kind == "translation" and len(look.said) == 2
    source, target = look.sentences["source"], look.sentences["translation"]
    assert source.tokens == ["▁w01", "▁w02", "▁w03", "▁w04", "</s>"] and source.limit == 4
    assert "".join(target.tokens[:-1]).replace("▁", " ").strip() == look.said[0][0] and target.tokens[-1] == "</s>"
    words, pieces = made.task.target_dictionary, look.said[0][0].split()
    numbers = torch.tensor([words.index(piece) for piece in pieces] + [words.eos()])
    previous = torch.cat((numbers.new_tensor([words.eos()]), numbers[:-1]))[None]
    numbers_in = torch.tensor([[made.task.source_dictionary.index(each) for each in TEXT.split()] + [2]])
    with torch.no_grad():
        out = made.model(numbers_in, torch.tensor([5]), previous)
    log_probs = made.model.get_normalized_probs(out, log_probs=True)[0]
    assert look.said[0][1] == pytest.approx(float(log_probs.gather(1, numbers[:, None]).sum().exp()), rel=1e-4)
    assert look.macs[0] < look.macs[1] and look.share == look.macs[0] / look.macs[1]


@pytest.mark.parametrize("name", ("mixture_of_recursions_lm", "par_transformer_xl"))
def test_continuation(name, explorer):
    look = explorer(name).look(TEXT, words=5, beam=2)
    (text,) = look.sentences.values()
    assert text.tokens[:4] == ["▁w01", "▁w02", "▁w03", "▁w04"] and 1 <= len(text.tokens) - 4 <= 6
    said = [each for each in text.tokens[4:] if each != "</s>"]
    assert look.said[0][0] == "".join(said).replace("▁", " ").strip() and 0 < look.said[0][1] <= 1
    assert all(1 <= depth <= text.limit for depth in text.depths)
    if name == "par_transformer_xl":  # which has no policies
        assert not explorer(name).dials and look.share == 1 and set(text.depths) == {text.limit}
    else:
        assert text.measure == "layers that computed it" and text.names[0] == "0"


def test_curve_and_dial_leave_the_model_as_it_was(explorer):
    made = explorer("pondernet")
    (dial,) = made.dials
    before, policies = made.look(TEXT), [(each.threshold, each.quantile) for each in dial.policies]
    points = made.curve(TEXT, dial)
    shares = [point.share for point in points]
    assert [point.value for point in points] == list(dial.values)
    assert shares[0] < 0.5 < shares[-1] <= 1.01  # repeats of a packed layer share keys of the source
    assert points[-1].likeness == 1.0 and all(0 <= point.likeness <= 1 for point in points)
    shallow = made.look(TEXT, dial=dial, value=0.1)
    assert set(shallow.sentences["source"].depths) == {1} != set(before.sentences["source"].depths)
    assert [(each.threshold, each.quantile) for each in dial.policies] == policies
    after = made.look(TEXT)
    assert after.said == before.said and after.macs == before.macs


def test_threshold_of_skimming(explorer):
    made = explorer("transkimmer")
    (dial,) = made.dials
    assert dial.name == "keeping threshold" and dial.values[-1] < 1
    with Turned(dial, 0.5):
        assert float(dial.policies[0].shift) == 0.0  # as it is trained
    dial.policies[0].move(0.25)
    with Turned(dial, 0.2):
        assert float(dial.policies[0].shift) == pytest.approx(0.25 + math.log(4))  # from where training has left it
    assert float(dial.policies[0].shift) == 0.25
    dial.policies[0].shift = None
    few = [sum(made.look(TEXT, dial=dial, value=value).macs[:1]) for value in (0.001, 0.999999)]
    assert few[1] < few[0] and dial.policies[0].shift is None


def test_dials_by_kind(build):
    flags = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("embed_dim", 16), ("layers", 2))
    }
    flags.update(
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_embed_dim=16, decoder_ffn_embed_dim=16
    )
    names = lambda **more: [each.name for each in dials_of(build("shared_transformer", **flags, **more))]  # noqa: E731
    assert names() == [] and names(halting="act") == ["exit quantile"]
    assert names(encoder_halting="saturation") == ["halting threshold"]
    assert names(encoder_router="mixture_of_depths") == ["capacity"]
    assert names(decoder_router="mixture_of_depths") == ["router threshold"]
    model = build("shared_transformer", **flags, encoder_halting="saturation", halting_threshold=0.7)
    (dial,) = dials_of(model)
    (policy,) = dial.policies
    assert isinstance(policy, Policy) and policy.threshold == 0.7
    with Turned(dial, 0.2):
        assert policy.threshold == 0.2
    with Turned(dial, None):
        assert policy.threshold == 0.7
    assert policy.threshold == 0.7


def test_refusals(explorer, place):
    made = explorer("pondernet")
    for text, why in (
        ("  ", "type a text first"),
        ("w01 " * 2000, "4,000 at most"),
        ("w01 " * 999 + "w", "there is room for"),
    ):
        if why == "there is room for":
            made.model.encoder.max_source_positions, before = 8, made.model.encoder.max_source_positions
            text = "w01 " * 9
        with pytest.raises(UsageError, match=why):
            made.look(text)
    made.model.encoder.max_source_positions = before
    with pytest.raises(UsageError, match="explore reads texts: it knows --task .* is of image_classification"):
        Explorer(place / "adatape_vit.pt")
    with pytest.raises(UsageError, match="--spm with its SentencePiece model, --codes .* or --tokenized"):
        Explorer(place / "pondernet.pt")
    with pytest.raises(UsageError, match="are not for classifiers: use --tokenizer"):
        Explorer(place / "transkimmer.pt", tokenizer=Tokenized())


def test_what_is_skimmed_by_a_command(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "texts").write_text(f"{TEXT} good\nw05 bad\n")
    words = ["plot", "skim", str(place / "transkimmer.pt"), "--tokenizer", str(place / "tok"), "--input"]
    commands.main([*words, str(tmp_path / "texts"), "--output", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert "| tokens computed by layer | tokens | 1 | 2 |\n" in out and re.search(r"\n\| all \| 11 \|", out)
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="exists and is left as it is"):
        commands.main([*words, str(tmp_path / "texts"), "--output", str(tmp_path / "a.png")])
