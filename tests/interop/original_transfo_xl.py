"""Transformer-XL as its first authors wrote it, from a state dict: the reference for tests of the conversion."""

import json
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

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
    """-log p of each of ``text[1:]`` given what is before, by the original's forward, float64; ``text`` is ``[N]``."""
    weights = {name.removeprefix("transformer."): tensor.double() for name, tensor in weights.items()}
    heads, width, dim = config["n_head"], config["d_head"], config["d_model"]
    ends = [*config["cutoffs"], config["vocab_size"]]
    starts = [0, *config["cutoffs"]]

    def cluster(word):
        return sum(word >= end for end in ends)

    def embed(word):
        if config["div_val"] == 1:
            row = weights["word_emb.emb_layers.0.weight"][word]
        else:
            c = cluster(word)
            row = weights[f"word_emb.emb_projs.{c}"] @ weights[f"word_emb.emb_layers.{c}.weight"][word - starts[c]]
        return row * math.sqrt(dim)

    def logits(c, hidden):
        if config["div_val"] == 1:
            table, bias = weights["crit.out_layers.0.weight"], weights["crit.out_layers.0.bias"]
            table, bias = table[starts[c] : ends[c]], bias[starts[c] : ends[c]]
        else:
            table, bias = weights[f"crit.out_layers.{c}.weight"], weights[f"crit.out_layers.{c}.bias"]
            hidden = hidden @ weights[f"crit.out_projs.{c}"]
        if c == 0 and len(ends) > 1:
            table = torch.cat((table, weights["crit.cluster_weight"]))
            bias = torch.cat((bias, weights["crit.cluster_bias"]))
        return (table @ hidden + bias).log_softmax(0)

    def loss(hidden, word):
        c = cluster(word)
        if c == 0:
            return -logits(0, hidden)[word]
        return -logits(0, hidden)[config["cutoffs"][0] + c - 1] - logits(c, hidden)[word - starts[c]]

    def position(distance):
        if config["clamp_len"] > 0:
            distance = min(distance, config["clamp_len"])
        angles = distance * (1 / 10000 ** (torch.arange(0.0, dim, 2.0) / dim)).double()
        return torch.cat((angles.sin(), angles.cos()))

    def norm(x, name):
        return F.layer_norm(x, (dim,), weights[name + ".layer_norm.weight"], weights[name + ".layer_norm.bias"])

    losses, memories = [], [torch.zeros(0, dim, dtype=torch.float64) for _ in range(config["n_layer"])]
    for first in range(0, len(text) - 1, segment):
        words = text[first : min(first + segment, len(text) - 1)]
        x = torch.stack([embed(word) for word in words])
        for layer in range(config["n_layer"]):
            name = f"layers.{layer}.dec_attn"
            past = torch.cat((memories[layer], x))
            projected = past @ weights[name + ".qkv_net.weight"].T
            queries, keys, values = projected.view(len(past), 3, heads, width).unbind(1)
            before = len(memories[layer])
            u, v = (weights[f"{name}.{b}" if config["untie_r"] else b] for b in ("r_w_bias", "r_r_bias"))
            rows = []
            for i in range(before, len(past)):
                seen = [j for j in range(i + 1) if not config["same_length"] or j > i - config["mem_len"]]
                r = torch.stack([position(i - j) for j in seen]) @ weights[name + ".r_net.weight"].T
                r = r.view(len(seen), heads, width)
                scores = ((queries[i] + u) * keys[seen] + (queries[i] + v) * r).sum(-1) / math.sqrt(width)
                rows.append((scores.softmax(0)[..., None] * values[seen]).sum(0).flatten())
            memories[layer] = past[-config["mem_len"] :]
            x = norm(x + torch.stack(rows) @ weights[name + ".o_net.weight"].T, name)
            name = f"layers.{layer}.pos_ff"
            inner = F.relu(F.linear(x, weights[name + ".CoreNet.0.weight"], weights[name + ".CoreNet.0.bias"]))
            x = norm(x + F.linear(inner, weights[name + ".CoreNet.3.weight"], weights[name + ".CoreNet.3.bias"]), name)
        losses += [loss(hidden, word) for hidden, word in zip(x, text[first + 1 :])]
    return torch.stack(losses)


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
