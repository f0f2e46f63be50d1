"""Masked language modelling under every halting rule that weighs depths, and sequences that are too long."""

import argparse

import pytest
import torch
from fairseq.criterions.masked_lm import MaskedLmLoss

from fairseq_adaptive.criterions.expected_output import ExpectedOutput
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording

SIZES = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2, "encoder_layers": 3}
SIZES = {**SIZES, "max_positions": 12, "dropout": 0.0, "attention_dropout": 0.0}
TAPE = {"tape_bank_size": 50, "tape_tokens": 4}
READER = {"reader": "tape", "reader_args": '{"bank_size": 50, "depth": 1}'}
MODELS = {
    "adatape": ("adatape_tiny", TAPE),
    "adatape-later": ("adatape_tiny", {**TAPE, "tape_layer": 2}),
    "adatape-dense": ("adatape_tiny", {"tape_tokens": 0}),
    "adatape-skimming": ("adatape_tiny", {**TAPE, "skimming": True, "tape_layer": 1}),
    "transkimmer": ("transkimmer_base", {}),
    "transkimmer-tape": ("transkimmer_base", {"no_skimming": True, **READER}),
    "albert_act": ("albert_act_tiny", {"encoder_input_dim": 8}),
    "albert_act-tape": ("albert_act_tiny", {"encoder_input_dim": 8, **READER}),
}


def words(pad, length=9):
    torch.manual_seed(2)
    tokens = torch.randint(4, 44, (3, length))
    tokens[0, -3:] = pad
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_the_expected_loss_is_that_over_depths(build, dictionary, name):
    arch, flags = MODELS[name]
    model = build(arch, **SIZES, **flags, halting="pondernet").train()
    tokens, target = words(dictionary.pad()), words(dictionary.pad())
    target[:, ::2] = dictionary.pad()  # not masked
    masked = target.ne(dictionary.pad())
    criterion = MaskedLmLoss(
        argparse.Namespace(tpu=False), argparse.Namespace(target_dictionary=dictionary, source_dictionary=dictionary)
    )
    stack = next(module for module in model.modules() if hasattr(module, "every_depth"))
    with recording(model) as traces:
        expected_model = ExpectedOutput(model, stack, traces)
        torch.manual_seed(1)
        sample = {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": 27, "nsentences": 3}
        loss, size, _ = criterion(expected_model, sample)
        torch.manual_seed(1)
        stack.every_depth = True
        scores, _ = model(src_tokens=tokens)  # [N B, T, V], of all words
        stack.every_depth = False
    each = scores.log_softmax(-1).unflatten(0, (-1, 3)).gather(-1, target.expand(len(scores) // 3, -1, -1)[..., None])
    weights = next(found for found in traces.values() if found)[-1].distribution[:, :, : tokens.size(1)]
    assert len(weights) == 3 and size == masked.sum()
    torch.testing.assert_close(
        loss, -(weights * each.squeeze(-1))[:, masked].sum(), rtol=1e-5, atol=1e-5, check_dtype=False
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in stack.halting.parameters())


@pytest.mark.parametrize("name", ("adatape", "adatape-dense", "transkimmer", "albert_act"))
def test_sequences_that_are_too_long(build, dictionary, name):
    arch, flags = MODELS[name]
    model = build(arch, **SIZES, **flags)
    model(words(dictionary.pad(), 12), features_only=True)
    with pytest.raises(UsageError, match="a sequence of 13 tokens .* --max-positions 12"):
        model(words(dictionary.pad(), 13), features_only=True)
