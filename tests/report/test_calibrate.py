"""``calibrate`` on trained models: what it says is what the models do, and what it prints sets them so."""

import ast
import json
import math

import pytest
import torch
from families import FAMILIES, Family, build_trainer, train, write_data

from fairseq_adaptive import commands
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint, load_model
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.report.early_exit import EarlyExits, losses
from fairseq_adaptive.report.risk import hoeffding_bentkus

MODELS = {  # of a family: further flags, and how many updates
    "universal_transformer": ((), 20),
    "pondernet": ((), 20),
    "shared_transformer": ((), 10),
    "shared_transformer_lm": (("--halting", "act", "--criterion", "ponder_loss"), 30),
    "albert_act": ((), 20),
    "classifier": ((), 80),
    "adatape_vit": (("--halting", "act"), 20),
    "adatape_parity": (("--halting", "ut_act", "--encoder-unique-layers", "1", "--encoder-layers", "3"), 10),
    "halting_transformer_xl": ((), 2),
}


CLASSIFIER = Family(
    "labels",
    "--task sentence_prediction --num-classes 2 --max-positions 32 --init-token 0 --arch transkimmer_base --no-skimming "
    "--encoder-layers 4 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --halting loop_gate "
    "--criterion ponder_loss --task-criterion sentence_prediction --batch-size 48 --lr 0.001",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """``checkpoints(family)``: a model trained for some updates, made when it is asked for."""
    folder, made = write_data(tmp_path_factory.mktemp("calibrate")), {}

    def checkpoints(family):
        if family not in made:
            flags, updates = MODELS[family]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(FAMILIES, "classifier", CLASSIFIER)
                trainer, batches = build_trainer(family, folder, *flags)
            train(trainer, batches, updates)
            trainer._gathered_optim_state = None
            made[family] = str(folder / f"{family}.pt")
            trainer.save_checkpoint(made[family], {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
        return made[family]

    return checkpoints


def calibrate(tmp_path, *words):
    """What the command writes."""
    output = tmp_path / "report.json"
    commands.main(["calibrate", *map(str, words), "--subset", "train", "--cpu", "--output", str(output)])
    report = json.loads(output.read_text())
    output.unlink()
    return report


def samples(task, model):
    task.load_dataset("train")
    positions = (task.max_positions(), model.max_positions())
    longest = min(each if isinstance(each, int) else min(each) for each in positions if each is not None)
    return task.get_batch_iterator(
        task.dataset("train"), max_sentences=50, max_positions=longest, ignore_invalid_inputs=True
    ).next_epoch_itr(shuffle=False)


def stack_of(model):
    return next((name, each) for name, each in model.named_modules() if isinstance(each, LayerStack))


@torch.no_grad()
def said(checkpoint, overrides, all_depths=False):
    """Logits and labels of a classifier, example by example, and the mean depth, by the model itself."""
    model, task = load_model(checkpoint, overrides)
    model.eval()
    if all_depths:
        stack_of(model)[1].halting.threshold = math.inf
    logits, labels, updates, tokens = [], [], 0, 0
    for sample in samples(task, model):
        with recording(model) as traces:
            found = model(
                **sample["net_input"], features_only=True, classification_head_name="sentence_classification_head"
            )
        logits.append(found[0]), labels.append(sample["target"].view(-1))
        (trace,) = traces[stack_of(model)[0]]
        updates, tokens = updates + trace.updates.sum(), tokens + trace.tokens.sum()
    return torch.cat(logits), torch.cat(labels), float(updates / tokens)


@pytest.mark.parametrize("knob", ("halting-threshold", "exit-quantile"))
def test_a_classifier_by_hand(checkpoints, tmp_path, knob):
    """Losses, p-values and depth of all values that were tested, of models loaded with the flags that are printed."""
    checkpoint, name = checkpoints("classifier"), knob.replace("-", "_")
    grid = (0.9, 0.6, 0.4, 0.2, 0.05)
    flags = ["--knob", knob, "--loss", "accuracy", "--tolerance", 0.05, "--grid", ",".join(map(str, grid))]
    report = calibrate(tmp_path, checkpoint, *flags)
    full, labels, depth = said(checkpoint, {}, all_depths=True)
    assert report["examples"] == len(labels) == 800 and report["full_depth"] == pytest.approx(depth) == 4
    right = full.argmax(-1) == labels
    assert right.float().mean() > 0.6
    for each, value in zip(report["tested"], grid):
        early, _, depth = said(checkpoint, {name: value})
        wrong = (right & (early.argmax(-1) != labels)).double().mean()
        assert each["value"] == value and each["loss"] == pytest.approx(float(wrong))
        assert each["p"] == pytest.approx(hoeffding_bentkus(float(wrong), 800, 0.05))
        assert each["kept"] == (each["p"] <= 0.05) and each["depth"] == pytest.approx(depth)
    assert all(each["kept"] for each in report["tested"][:-1])
    kept = [each for each in report["tested"] if each["kept"]]
    assert report["chosen"] == min(kept, key=lambda each: each["depth"])["value"]
    assert report["model_overrides"] == {name: report["chosen"]}


TEXTS = [
    ("universal_transformer", "bleu"),
    ("universal_transformer", "chrf"),
    ("pondernet", "nll"),
    ("shared_transformer_lm", "nll"),
    ("albert_act", "nll"),
]


@pytest.mark.parametrize("family, loss", [*TEXTS, ("adatape_vit", "accuracy"), ("adatape_parity", "disagreement")])
def test_what_is_printed_sets_the_model(checkpoints, tmp_path, capsys, family, loss):
    """A model loaded with it has the scores that were calibrated; nothing above its threshold is tested."""
    checkpoint = checkpoints(family)
    flags = ["--loss", loss, "--tolerance", 0.4, "--confidence", 0.8, "--batch-size", 50]
    flags += ["--grid", "0.99,0.5"] if loss in ("bleu", "chrf") else []
    report = calibrate(tmp_path, checkpoint, *flags)
    printed = ast.literal_eval(capsys.readouterr().out.split("--model-overrides ")[1].splitlines()[0].strip('"'))
    assert printed == report["model_overrides"] == {"halting_threshold": report["chosen"]}
    assert report["tested"][0]["value"] == (0.999 if family == "pondernet" else 0.99)
    row = next(each for each in report["tested"] if each["value"] == report["chosen"])
    exits = EarlyExits(checkpoint, None, "train", "halting-threshold", loss, 50, printed)
    early = exits.run()
    exits = EarlyExits(checkpoint, None, "train", "halting-threshold", loss, 50)
    exits.full_depth()
    full = exits.run()
    found = losses(loss, full.scores, early.scores)
    assert row["loss"] == pytest.approx(sum(found) / len(found), abs=1e-7) and row["depth"] == pytest.approx(
        early.depth
    )
    assert row["share"] == pytest.approx(early.macs / full.macs) and report["full_depth"] == full.depth


def test_nll_by_hand(checkpoints):
    checkpoint = checkpoints("pondernet")
    exits = EarlyExits(checkpoint, None, "train", "exit-quantile", "nll", 50)
    exits.turn(0.5)
    found, (model, task) = exits.run(), load_model(checkpoint)
    by_hand = []
    for sample in samples(task, model.eval()):
        with torch.no_grad():
            logits = model(**sample["net_input"])[0]
        for row, target in zip(logits, sample["target"]):
            real = target != task.target_dictionary.pad()
            by_hand.append(float(torch.nn.functional.cross_entropy(row[real], target[real])))
    assert found.scores == pytest.approx(by_hand, abs=1e-5)


def test_losses_are_what_was_lost():
    assert losses("accuracy", [1, 1, 0, 0], [1, 0, 1, 0]) == [0, 1, 0, 0]
    assert losses("disagreement", [3, 1], [3, 2]) == [0, 1]
    assert losses("nll", [1.0, 1.0, 1.0], [1.25, 0.5, 9.0]) == [0.25, 0, 1]
    assert losses("bleu", [40.0, 10.0], [30.0, 20.0]) == [0.1, 0]


def test_early_exit_of_a_model_that_was_trained_without(checkpoints, tmp_path):
    """Full depth is that of the model as it was trained, and both sides' flags stay."""
    given = "{'halting': 'saturation', 'decoder_halting_threshold': 0.9}"
    flags = ["--model-overrides", given, "--loss", "nll", "--tolerance", 0.3, "--grid", "0.99,0.9"]
    report = calibrate(tmp_path, checkpoints("shared_transformer"), *flags)
    assert report["full_depth"] == 4 and report["tested"][-1]["depth"] < 4
    value = report["chosen"]
    same = {"halting_threshold": value, "decoder_halting_threshold": value}
    assert report["model_overrides"] == {"halting": "saturation", **same}


def test_the_other_name_of_the_knob_is_taken_away(checkpoints, tmp_path):
    flags = ["--model-overrides", "{'halting_threshold': 0.5}", "--knob", "exit-quantile", "--loss", "nll"]
    report = calibrate(tmp_path, checkpoints("pondernet"), *flags, "--tolerance", 0.5, "--grid", "0.4")
    assert report["model_overrides"] == {"halting_threshold": None, "exit_quantile": 0.4}
    model, _ = load_model(checkpoints("pondernet"), report["model_overrides"])
    assert model.encoder.layers.halting.threshold == model.decoder.layers.halting.threshold == 0.4


def test_none_is_found(checkpoints, tmp_path, capsys):
    report = calibrate(tmp_path, checkpoints("classifier"), "--loss", "nll", "--tolerance", 0.01, "--grid", "0.01")
    assert report["chosen"] is None and report["model_overrides"] == {} and not report["tested"][0]["kept"]
    assert "keep full depth" in capsys.readouterr().out


def test_an_old_checkpoint_takes_the_new_knob(checkpoints, tmp_path):
    state = load_checkpoint(checkpoints("shared_transformer_lm"))
    del state["cfg"]["model"]["exit_quantile"]
    torch.save(state, tmp_path / "old.pt")
    flags = ["--knob", "exit-quantile", "--loss", "nll", "--tolerance", 0.5, "--grid", 0.4]
    report = calibrate(tmp_path, tmp_path / "old.pt", *flags)
    rule = load_model(str(tmp_path / "old.pt"), report["model_overrides"])[0].decoder.layers.halting
    assert report["model_overrides"] == {"exit_quantile": 0.4} and rule.quantile == 0.4


@pytest.mark.parametrize(
    "family, flags, message",
    [
        ("shared_transformer", ("--loss", "nll"), "no tokens halt in this model, .* train it with --halting"),
        ("pondernet", ("--loss", "accuracy"), "--loss accuracy is not for --task translation: use bleu or chrf or nll"),
        (
            "classifier",
            ("--loss", "bleu"),
            "is not for --task sentence_prediction: use accuracy or disagreement or nll",
        ),
        ("pondernet", ("--loss", "nll", "--tolerance", "0.001"), "600 examples, .* needs 2,995 at least"),
        ("halting_transformer_xl", ("--loss", "nll"), "a segment depends on those before"),
        (
            "shared_transformer",
            ("--loss", "nll", "--knob", "exit-quantile", "--model-overrides", "{'halting': 'saturation'}"),
            "rules with a distribution over depths",
        ),
        (
            "shared_transformer",
            ("--loss", "nll", "--model-overrides", "{'decoder_halting': 'patience'}"),
            "--halting patience has no threshold",
        ),
        (
            "pondernet",
            ("--loss", "nll", "--model-overrides", "{'halting_args': '{\"threshold\": 0.4}'}"),
            "in its --halting-args, where no other flag changes it",
        ),
    ],
)
def test_refused(checkpoints, tmp_path, family, flags, message):
    with pytest.raises(UsageError, match=message):
        calibrate(tmp_path, checkpoints(family), *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--tolerance", "1"), "use a number above 0 and below 1"),
        (("--confidence", "0"), "use a number above 0 and below 1"),
        (("--grid", "0.5,2"), "use a number above 0 and up to 1"),
        (("--model-overrides", "{'halting'"), "is no dict of flags"),
    ],
)
def test_refused_at_once(capsys, flags, message):
    with pytest.raises(SystemExit):
        commands.main(["calibrate", "nowhere.pt", "--loss", "nll", *flags])
    assert message in capsys.readouterr().err
