"""Adaptive softmax in every model that has one: flags, checkpoints, and the criterions that train it."""

import argparse
import itertools

import pytest
import torch
from cli.helpers import call
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from families import write_data

from fairseq_adaptive.criterions.adaptive_cross_entropy import AdaptiveCrossEntropy
from fairseq_adaptive.errors import UsageError

SIZES = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 2}
TRANSLATION = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIZES.items()}
LM = {name: value for name, value in TRANSLATION.items() if name.startswith("decoder")}
LM = {**LM, "decoder_input_dim": 16, "decoder_output_dim": 16, "adaptive_softmax_cutoff": "20,30"}
INPUT = {"adaptive_input": True, "adaptive_input_cutoff": "20,30"}
TIED = {**INPUT, "tie_adaptive_weights": True, "adaptive_input_factor": 2, "adaptive_softmax_factor": 2}
XL = {**{name: value for name, value in LM.items() if "put_dim" not in name and "layers" not in name}}
MODELS = {
    "translation": ("shared_transformer", {"adaptive_softmax_cutoff": [20, 30]}),
    "translation-share-decoder": (
        "shared_transformer",
        {"adaptive_softmax_cutoff": [20, 30], "share_decoder_input_output_embed": True},
    ),
    "translation-share-all": ("shared_transformer", {"adaptive_softmax_cutoff": [20], "share_all_embeddings": True}),
    "lm": ("shared_transformer_lm_base", LM),
    "lm-share": ("shared_transformer_lm_base", {**LM, "share_decoder_input_output_embed": True}),
    "lm-input": ("shared_transformer_lm_base", {**LM, **INPUT}),
    "lm-tied": ("shared_transformer_lm_base", {**LM, **TIED}),
    "lm-tied-projections": ("shared_transformer_lm_base", {**LM, **TIED, "tie_adaptive_proj": True}),
    "transformer_xl": ("par_transformer_xl", {**XL, "layout": "af*2"}),
    "transformer_xl-tied": ("par_transformer_xl", {**XL, "layout": "af", "share_decoder_input_output_embed": True}),
    "supernet": ("par_supernet", {**XL, "blocks": 2, "temperature_updates": 10}),
}


def model_of(build, name, **more):
    arch, flags = MODELS[name]
    return build(arch, **{**(TRANSLATION if arch == "shared_transformer" else {}), **flags, "dropout": 0.0, **more})


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_load(build, name):
    model, other = model_of(build, name), model_of(build, name, seed=2)
    state = model.state_dict()
    other.load_state_dict({**state})  # upgraded in place
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_checkpoint_of_another_output_layer_is_refused(build):
    whole = build("shared_transformer", **TRANSLATION, share_decoder_input_output_embed=True).state_dict()
    with pytest.raises(UsageError, match="of another architecture"):
        model_of(build, "translation-share-decoder").load_state_dict(whole)


def loss_of(criterion, model, batch):
    target = batch["prev_output_tokens"].roll(-1, 1)
    source = {} if hasattr(model, "encoder") else {"src_tokens": batch["prev_output_tokens"]}
    model.train(), model.zero_grad(), torch.manual_seed(1)
    loss, *_ = criterion(model, {"net_input": source or batch, "target": target, "ntokens": 1})
    loss.sum().backward()
    return float(loss.sum()), {name: each.grad for name, each in model.named_parameters()}


def criterion_of(kind, dictionary):
    task = argparse.Namespace(target_dictionary=dictionary)
    if kind is AdaptiveCrossEntropy:
        return kind(task, argparse.Namespace(sentence_avg=False, label_smoothing=0.0))
    return kind(task, False)


@pytest.mark.parametrize("name", MODELS)
def test_cross_entropy_is_that_of_the_clusters(build, batch, dictionary, name):
    """fairseq's plain criterions see log-probabilities of all words, with a gradient."""
    model = model_of(build, name)
    kinds = CrossEntropyCriterion, AdaptiveCrossEntropy
    (all_words, gradients), (clusters, others) = (
        loss_of(criterion_of(kind, dictionary), model, batch) for kind in kinds
    )
    assert all_words == pytest.approx(clusters, rel=1e-6)
    for parameter, gradient in gradients.items():
        if gradient is not None and others[parameter] is not None:
            torch.testing.assert_close(gradient, others[parameter], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model.eval()
        source = batch if hasattr(model, "encoder") else {"src_tokens": batch["prev_output_tokens"]}
        out = model(**source)
        probabilities = model.get_normalized_probs(out, log_probs=False)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]))
    torch.testing.assert_close(model.get_normalized_probs(out, log_probs=False), probabilities)
    torch.testing.assert_close(model.get_normalized_probs(out, log_probs=True), probabilities.log())


@pytest.mark.parametrize("name", ("translation", "lm", "transformer_xl", "supernet"))
def test_the_adaptive_loss_of_fairseq(build, batch, dictionary, name):
    """It is made for fairseq's own softmax."""
    model, criterion = model_of(build, name), criterion_of(AdaptiveLoss, dictionary)
    if name in ("translation", "lm"):
        assert loss_of(criterion, model, batch)[0] > 0
        return
    with pytest.raises(UsageError, match="use --criterion adaptive_cross_entropy"):
        loss_of(criterion, model, batch)


WRONG = ("30,20", "10,10", "-5", "0", "48", "1000000", "abc", "10.5", "[[1]]", "", "__import__('os')")


@pytest.mark.parametrize("arch", ("shared_transformer", "shared_transformer_lm_base", "par_transformer_xl"))
def test_wrong_cutoffs(build, arch):
    flags = {"shared_transformer": TRANSLATION, "par_transformer_xl": {**XL, "layout": "af"}}.get(arch, {**LM, **INPUT})
    names = ("adaptive_softmax_cutoff", "adaptive_input_cutoff") if arch.startswith("shared_transformer_lm") else ()
    for name, wrong in itertools.product(names or ("adaptive_softmax_cutoff",), WRONG):
        if wrong == "" and arch == "par_transformer_xl" or wrong == "48" and arch != "par_transformer_xl":
            continue  # no adaptive softmax; fairseq takes the size of the vocabulary for the last
        with pytest.raises(UsageError, match="cutoff"):
            build(arch, **{**flags, name: wrong})
    build(arch, **{**flags, "adaptive_softmax_cutoff": "20,30"})


@pytest.mark.parametrize(
    "changed",
    (
        {"adaptive_input": False},
        {"adaptive_softmax_cutoff": None},
        {"adaptive_softmax_cutoff": "20"},
        {"adaptive_softmax_factor": 3},
        {"decoder_output_dim": 8},
    ),
    ids=str,
)
def test_ties_that_do_not_fit(build, changed):
    with pytest.raises(UsageError, match="--tie-adaptive-weights needs"):
        build("shared_transformer_lm_base", **{**LM, **TIED, **changed})


def test_a_factor_that_leaves_no_width(build):
    with pytest.raises(UsageError, match="--adaptive-softmax-cutoff .*use a smaller factor"):
        model_of(build, "translation", adaptive_softmax_factor=100)


ROUND_TRIPS = {
    "pairs": ("", "--share-decoder-input-output-embed", "--share-all-embeddings"),
    "text": ("", "--share-decoder-input-output-embed", "--adaptive-input --adaptive-input-cutoff 10,20"),
}


@pytest.mark.slow
@pytest.mark.parametrize("data", ROUND_TRIPS)
def test_round_trips(data, tmp_path):
    """Trained, resumed, and used, by fairseq's commands."""
    write_data(tmp_path / "data")
    sizes = {"pairs": TRANSLATION, "text": LM}[data]
    sizes = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", value)]
    kind = {
        "pairs": "--task translation -s src -t tgt --arch shared_transformer",
        "text": "--task language_modeling --tokens-per-sample 16 --arch shared_transformer_lm",
    }[data]
    for number, flags in enumerate(ROUND_TRIPS[data]):
        common = [tmp_path / "data" / data, *kind.split(), *sizes, "--adaptive-softmax-cutoff", "10,20", *flags.split()]
        common += "--cpu --num-workers 0 --optimizer adam --batch-size 20 --criterion adaptive_cross_entropy".split()
        common += ["--disable-validation", "--save-dir", tmp_path / f"{data}{number}"]
        checkpoint = tmp_path / f"{data}{number}" / "checkpoint_last.pt"
        for updates in (1, 2):
            call("fairseq-train", *common, "--max-update", updates)
            extra = torch.load(checkpoint, weights_only=False)["optimizer_history"][-1]
            assert extra["num_updates"] == updates
        use = [tmp_path / "data" / data, "--path", checkpoint, "--gen-subset", "train", "--cpu", "--num-workers", 0]
        if data == "pairs":
            assert "H-0" in call("fairseq-generate", *use, "--beam", 2, "--max-len-b", 3, "--max-len-a", 0)
        else:
            call("fairseq-eval-lm", *use, "--tokens-per-sample", 16, "--batch-size", 50)
