"""Weights and folders of small Transformer-XLs as their first authors wrote them, and the losses by the definition."""

import json
from argparse import Namespace

import pytest
import torch

from fairseq_adaptive.interop.definitions.transfo_xl import log_probabilities

WORDS = ["the", "<eos>", ",", "of", "<unk>", *(f"w{number}" for number in range(26))]
BASE = {
    "vocab_size": len(WORDS),
    "cutoffs": [8, 20],
    "d_model": 16,
    "d_embed": 16,
    "n_head": 2,
    "d_head": 6,
    "d_inner": 24,
    "n_layer": 3,
    "div_val": 1,
    "mem_len": 7,
    "same_length": False,
    "clamp_len": -1,
    "untie_r": False,
    "tie_weight": True,
    "tie_projs": [False, True, True],
    "attn_type": 0,
    "model_type": "transfo-xl",
}


def random_weights(config, seed=1):
    """The state dict of the original, with a value in every entry."""
    torch.manual_seed(seed)
    dim, inner = config["d_model"], config["n_head"] * config["d_head"]
    ends = [0, *config["cutoffs"], config["vocab_size"]]
    sizes = [config["vocab_size"]] if config["div_val"] == 1 else [b - a for a, b in zip(ends, ends[1:])]
    shapes = {}
    for number, size in enumerate(sizes):
        width = dim // config["div_val"] ** number
        shapes[f"transformer.word_emb.emb_layers.{number}.weight"] = (size, width)
        shapes[f"crit.out_layers.{number}.weight"] = (size, width)
        shapes[f"crit.out_layers.{number}.bias"] = (size,)
        if config["div_val"] != 1:
            shapes[f"transformer.word_emb.emb_projs.{number}"] = (dim, width)
            shapes[f"crit.out_projs.{number}"] = (dim, width)
    if config["cutoffs"]:
        shapes["crit.cluster_weight"] = (len(config["cutoffs"]), dim)
        shapes["crit.cluster_bias"] = (len(config["cutoffs"]),)
    for layer in range(config["n_layer"]):
        name = f"transformer.layers.{layer}."
        shapes[name + "dec_attn.qkv_net.weight"] = (3 * inner, dim)
        shapes[name + "dec_attn.r_net.weight"] = (inner, dim)
        shapes[name + "dec_attn.o_net.weight"] = (dim, inner)
        shapes[name + "pos_ff.CoreNet.0.weight"] = (config["d_inner"], dim)
        shapes[name + "pos_ff.CoreNet.0.bias"] = (config["d_inner"],)
        shapes[name + "pos_ff.CoreNet.3.weight"] = (dim, config["d_inner"])
        shapes[name + "pos_ff.CoreNet.3.bias"] = (dim,)
        for part in ("dec_attn", "pos_ff"):
            shapes[f"{name}{part}.layer_norm.weight"] = shapes[f"{name}{part}.layer_norm.bias"] = (dim,)
        for bias in ("r_w_bias", "r_r_bias"):
            shapes[f"{name}dec_attn.{bias}" if config["untie_r"] else f"transformer.{bias}"] = (
                config["n_head"],
                config["d_head"],
            )
    weights = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    for number in range(len(sizes)):
        if config["tie_weight"]:
            weights[f"crit.out_layers.{number}.weight"] = weights[f"transformer.word_emb.emb_layers.{number}.weight"]
        if config["div_val"] != 1 and config["tie_projs"][number]:
            weights[f"crit.out_projs.{number}"] = weights[f"transformer.word_emb.emb_projs.{number}"]
    return weights


def original_losses(weights, config, text, segment):
    """-log p of each of ``text[1:]`` given what is before, by the definition; ``text`` is ``[N]``."""
    found = log_probabilities(weights, config, text[:-1], segment)
    return -found.gather(1, torch.tensor(text[1:]).unsqueeze(1)).squeeze(1)


def write_original(folder, config, weights, safe=False, words=WORDS):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if safe:
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed (extra hf)")
        safetensors.save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words))
    return Namespace(input=str(folder), vocab=str(folder / "vocab.txt"), eos="<eos>", cluster_order=None)
