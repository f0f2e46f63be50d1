"""Attention weights over the source are those of fairseq's Transformer, in every mode; with policies they have its shape."""

import argparse
import itertools

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy_with_alignment import (
    LabelSmoothedCrossEntropyCriterionWithAlignment,
)

from fairseq_adaptive.modules.layers import attention

TINY = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 4, "layers": 4}.items()
}
ALL_LAYERS = {"encoder_unique_layers": 4, "decoder_unique_layers": 4, "layer_sharing": "sequence", "dropout": 0.0}
WHICH = [{}, {"alignment_layer": 1}, {"alignment_heads": 2}, {"alignment_layer": 0, "alignment_heads": 1}]
FULL = {"alignment_layer": 2, "full_context_alignment": True}
POLICIES = {
    "act": {"decoder_halting": "act"},
    "pondernet": {"decoder_halting": "pondernet"},
    "margin": {"decoder_halting": "margin", "decoder_halting_threshold": 0.05},
    "skimming": {"decoder_router": "skimming"},
    "mixture_of_depths": {"decoder_router": "mixture_of_depths"},
    "mixture_of_depths-act": {"decoder_router": "mixture_of_depths", "decoder_halting": "act"},
}


def forward(model, batch, mode, **options):
    if mode != "generation":
        model.train(mode == "train")
    else:
        model.make_generation_fast_(need_attn=False)
    with torch.set_grad_enabled(mode == "train"):
        encoder_out = model.encoder(batch["src_tokens"], batch["src_lengths"])
        return model.decoder(batch["prev_output_tokens"], encoder_out=encoder_out, **options)


@pytest.mark.parametrize("length", ("short", "long"))
def test_equal_to_stock(build, batch, length, monkeypatch):
    monkeypatch.setattr(attention, "LONGEST", {"short": 128, "long": 0}[length])
    stock, ours = build("transformer", **TINY, dropout=0.0), build("shared_transformer", **TINY, **ALL_LAYERS)
    ours.load_state_dict(stock.state_dict())
    real = batch["prev_output_tokens"] != 1
    for mode, options in itertools.product(("train", "eval", "generation"), [*WHICH, FULL]):
        (scores, theirs), (our_scores, extra) = (forward(model, batch, mode, **options) for model in (stock, ours))
        torch.testing.assert_close(our_scores, scores, rtol=0, atol=1e-6)
        assert extra["attn"][0].shape == theirs["attn"][0].shape == (*real.shape, batch["src_tokens"].size(1))
        torch.testing.assert_close(extra["attn"][0][real], theirs["attn"][0][real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", ("short", "long"))
def test_dropout_does_not_change_what_is_returned(build, batch, length, monkeypatch):
    monkeypatch.setattr(attention, "LONGEST", {"short": 128, "long": 0}[length])
    model = build("shared_transformer", **TINY, **ALL_LAYERS, attention_dropout=0.5)
    weights = forward(model, batch, "train")[1]["attn"][0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_policies(build, batch, policy):
    """In each mode there are weights, those of the last depth at which a token is computed; None asks for all depths."""
    model = build("shared_transformer", **TINY, decoder_unique_layers=2, dropout=0.0, **POLICIES[policy])
    real = batch["prev_output_tokens"] != 1
    dense = []
    for mode in ("train", "dense", "eval", "generation"):
        model.decoder.layers.packed = False if mode == "dense" else None
        for number, options in enumerate(WHICH):
            weights = forward(model, batch, mode, **options)[1]["attn"][0]
            assert weights.shape == (*real.shape, batch["src_tokens"].size(1))
            assert weights.requires_grad == (mode == "train")
            sums = weights[real].sum(-1)  # zeros where a token was left out at all of the depths
            torch.testing.assert_close(sums, sums.round(), rtol=0, atol=1e-5)
            assert sums.sum() > 0
            if mode == "dense":
                dense.append(weights)
            elif mode != "train":
                torch.testing.assert_close(weights[real], dense[number][real], rtol=0, atol=1e-6)


def test_halting_at_the_end_gives_the_weights_of_the_depth_asked_for(build, batch):
    """A halting rule that lets all tokens run: what it returns for a layer is what the model without it returns."""
    flags = {**TINY, "decoder_unique_layers": 2, "dropout": 0.0}
    model, plain = build("shared_transformer", **flags, decoder_halting="margin"), build("shared_transformer", **flags)
    model.load_state_dict(plain.state_dict())
    model.decoder.layers.halting.threshold = 2.0
    for mode in ("train", "eval"):
        for options in WHICH:
            ours, theirs = (forward(each, batch, mode, **options)[1]["attn"][0] for each in (model, plain))
            real = batch["prev_output_tokens"] != 1
            torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("halting", ("none", "act"))
def test_alignment_training(build, batch, dictionary, halting):
    """``label_smoothed_cross_entropy_with_alignment`` on the weights: equal to stock, and with halting it has a gradient."""
    task = argparse.Namespace(target_dictionary=dictionary)
    criterion = LabelSmoothedCrossEntropyCriterionWithAlignment(task, False, 0.1, 0.5)
    target = batch["prev_output_tokens"].roll(-1, 1)
    sample = {"net_input": batch, "target": target, "ntokens": 16, "align_weights": torch.ones(3).double()}
    sample["alignments"] = torch.tensor([[1, 0], [4, 8 + 1], [6, 16 + 2]])  # source, target of all
    stock = build("transformer", **TINY, dropout=0.0).train()
    ours = build("shared_transformer", **TINY, **ALL_LAYERS, decoder_halting=halting).train()
    if halting == "none":
        ours.load_state_dict(stock.state_dict())
    (loss, *_), (our_loss, _, log) = (criterion(model, sample) for model in (stock, ours))
    assert log["alignment_loss"] > 0 and our_loss.isfinite()
    if halting == "none":
        torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=1e-6)
    our_loss.backward()
    assert ours.decoder.layers[0].encoder_attn.k_proj.weight.grad.abs().sum() > 0


def asked(model, batch, mode):
    """At which depths the attention to the source gives weights."""
    found = []
    for layer in model.decoder.layers:
        own = layer.encoder_attn.forward

        def forward_of(*args, own=own, **kwargs):
            out = own(*args, **kwargs)
            found.append(out[1] is not None)
            return out

        layer.encoder_attn.forward = forward_of
    forward(model, batch, mode)
    for layer in model.decoder.layers:
        del layer.encoder_attn.forward
    return found


@pytest.mark.parametrize("mode", ("train", "eval", "generation"))
def test_weights_that_nobody_sees_are_not_made(build, batch, mode):
    model = build("shared_transformer", **TINY, **ALL_LAYERS)
    assert asked(model, batch, mode) == [False, False, False, True]


@pytest.mark.parametrize("length", ("short", "long"))
def test_hooks_of_maps_are_called(build, batch, length, monkeypatch):
    """As fairseq's attention to the source calls its maps in evaluation, where torch's fused function reads their weights."""
    monkeypatch.setattr(attention, "LONGEST", {"short": 128, "long": 0}[length])
    stock, ours = build("transformer", **TINY, dropout=0.0), build("shared_transformer", **TINY, **ALL_LAYERS)
    ours.load_state_dict(stock.state_dict())
    before = forward(ours, batch, "eval")[0]
    for model in (stock, ours):
        for layer in model.decoder.layers:
            layer.encoder_attn.v_proj.register_forward_hook(lambda module, inputs, out: 2 * out)
    scores, theirs = (forward(model, batch, "eval")[0] for model in (ours, stock))
    torch.testing.assert_close(scores, theirs, rtol=0, atol=1e-6)
    assert (scores - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", ("layer", "attention"))
def test_a_hook_sees_what_fairseq_shows_it(build, batch, part):
    """fairseq's layers give their weights to the source in evaluation, so that hooks can read them."""
    stock, ours = build("transformer", **TINY, dropout=0.0), build("shared_transformer", **TINY, **ALL_LAYERS)
    ours.load_state_dict(stock.state_dict())
    seen = []
    for model in (stock, ours):
        seen.append([])
        for layer in model.decoder.layers:
            module = layer if part == "layer" else layer.encoder_attn
            module.register_forward_hook(lambda module, inputs, out, to=seen[-1]: to.append(out[1]))
        forward(model, batch, "eval")
    assert len(seen[0]) == len(seen[1]) == 4
    for theirs, mine in zip(*seen):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, check_dtype=False)
