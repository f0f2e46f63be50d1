"""Tiny models whose hypotheses differ, and searches with them."""

import argparse

import torch
from fairseq.tasks import FairseqTask

from fairseq_adaptive.modules.layers.depth_lora import PARTS
from fairseq_adaptive.modules.policies import LearnedHalting

TINY = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 5}.items()
}
UNIQUE = {"encoder_unique_layers": 2, "decoder_unique_layers": 2}


def shared(build, seed=1, **flags):
    return lively(build("shared_transformer", seed=seed, **{**TINY, **UNIQUE, **flags}))


def moved(model, scale=0.3):
    """The model with differences of depths that are not 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.rpartition(".")[2] in PARTS:
                each.copy_(torch.randn(each.shape, generator=generator) * scale)
    return model


def lively(model):
    """Random weights say much the same of all words, and never the end: make hypotheses differ, also in length."""
    if model.decoder.output_projection is not None:
        model.decoder.output_projection.weight.data *= 3
        model.decoder.output_projection.weight.data[2] *= 1.5
    return model


class Task(FairseqTask):
    def __init__(self, dictionary):
        super().__init__(None)
        self.target_dictionary = dictionary

    target_dictionary = None


def search(models, dictionary, batch, generator_class=None, prefix_tokens=None, fast=False, **options):
    """The hypotheses of ``generator_class``, or of the one that fairseq's task builds."""
    args = argparse.Namespace(**{"beam": 3, "max_len_a": 0, "max_len_b": 24, **options})
    if fast:
        for model in models:
            model.make_generation_fast_(need_attn=bool(options.get("print_alignment")))
    generator = Task(dictionary).build_generator(models, args, generator_class)
    torch.manual_seed(3)
    sample = {"id": torch.arange(len(batch["src_tokens"])), "target": batch["prev_output_tokens"]}
    sample["net_input"] = {name: value for name, value in batch.items() if name != "prev_output_tokens"}
    return generator.generate(models, sample, prefix_tokens=prefix_tokens)


def assert_same(ours, theirs):
    assert [len(found) for found in ours] == [len(found) for found in theirs]
    for number, (our, their) in enumerate(zip(sum(ours, []), sum(theirs, []))):
        assert our["tokens"].tolist() == their["tokens"].tolist()
        torch.testing.assert_close(our["score"], their["score"], rtol=1e-6, atol=1e-5, check_dtype=False)
        torch.testing.assert_close(our["positional_scores"], their["positional_scores"], rtol=0, atol=1e-5)
        if number < 40:  # native steps compute them one by one
            torch.testing.assert_close(our["attention"], their["attention"], rtol=0, atol=1e-5)


MODELS = [
    {},
    {"encoder_normalize_before": True, "decoder_normalize_before": True, "layer_sharing": "cycle"},
    {"share_all_embeddings": True, "layer_sharing": "sequence"},
    {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True, "activation_fn": "gelu"},
    {"adaptive_softmax_cutoff": "20,30"},
    {"init": "admin", "decoder_unique_layers": 5},
    {"decoder_input_dim": 12, "decoder_output_dim": 12, "no_token_positional_embeddings": True},
]
OPTIONS = [
    {"beam": 1},
    {"beam": 7, "unnormalized": True},
    {"beam": 46, "max_len_b": 4},
    {"min_len": 6, "lenpen": 0.3},
    {"min_len": 0, "unkpen": 2.0, "temperature": 1.5},
    {"max_len_b": 5},
    {"no_repeat_ngram_size": 2},
]
PRE_LN = {"decoder_normalize_before": True, "decoder_unique_layers": 1}


def halting(build, rule, **flags):
    """A model whose tokens halt at different depths."""
    thresholds = {
        "pondernet": 0.5,
        "loop_gate": 0.5,
        "saturation": 0.8,
        "margin": 0.3,
        "patience": None,
        "stick_breaking": 0.8,
    }
    name = "decoder_halting" if rule in ("margin", "patience") else "halting"
    model = shared(build, **{name: rule}, halting_threshold=thresholds.get(rule, 0.9), **flags)
    for module in model.modules():
        if isinstance(module, LearnedHalting):
            torch.nn.init.normal_(module.unit.weight, std=0.4)
            torch.nn.init.constant_(module.unit.bias, -1.0)
    return model
