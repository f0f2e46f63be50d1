"""ALBERT-ACT (Simoulin and Crabbe, 2021) by the names of the published weights (asi/albert-act-base)."""

import math
from typing import Any, Dict, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from fairseq_adaptive.interop.definitions.doubles import ACTIVATIONS, Doubles

EPS = 1e-12  # of all LayerNorms
LAYER = "encoder.albert_layer."
_PREDICTIONS = ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias", "bias")


class Encoded(NamedTuple):
    """
    Attributes:
        states: ``[T, C]``
        updates: ``[T]``, how often each token went through the layer
        remainders: ``[T]``
        margin: how far from the threshold the closest decision was
    """

    states: Tensor
    updates: Tensor
    remainders: Tensor
    margin: float


def encode(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Sequence[int], types: Sequence[int]
) -> Encoded:
    """States of one sequence without padding: one layer, applied to a token until it halts (Graves, 2016).

    A token halts when the sum of its halting probabilities exceeds ``1 - act_epsilon``; the weight of that update is what
    is left to 1. After ``num_hidden_layers`` updates it stops, whatever the sum.

    Args:
        tensors: as read, of the body alone or with the heads of pretraining
        config: ``config.json``
        ids: ``[T]``, the original's numbers of tokens
        types: ``[T]``, token types

    Raises:
        KeyError: when a tensor is missing
    """
    w, most, threshold = Doubles(tensors, "albert."), config["num_hidden_layers"], 1 - config["act_epsilon"]
    x = w.rows("embeddings.word_embeddings.weight", ids)
    x = x + w.rows("embeddings.position_embeddings.weight", range(len(ids)))
    x = w.norm("embeddings.LayerNorm", x + w.rows("embeddings.token_type_embeddings.weight", types), EPS)
    x = w.linear("encoder.embedding_hidden_mapping_in", x)
    h, r, n = (torch.zeros(len(ids), dtype=torch.float64) for _ in range(3))
    margin = math.inf
    while ((h < threshold) & (n < most)).any():
        y = _layer(w, config, x)
        p, running = torch.sigmoid(w.linear(LAYER + "act.dense", y))[:, 0], h < 1
        margin = min([margin, *(h + p - threshold)[running].abs().tolist()])
        new = running & (h + p > threshold)
        still = running & ~new
        h = h + p * still
        r = r + (1 - h) * new
        u = (p * still + r * new)[:, None]
        h, n, x = h + r * new, n + running, y * u + x * (1 - u)
    return Encoded(x, n, r, margin)


def _layer(w, config, x):
    query, key, value = (
        w.linear(f"{LAYER}attention.{name}", x).unflatten(1, (config["num_attention_heads"], -1)).transpose(0, 1)
        for name in ("query", "key", "value")
    )
    attention = (query @ key.transpose(1, 2) / math.sqrt(query.size(2))).softmax(-1) @ value
    attention = w.linear(LAYER + "attention.dense", attention.transpose(0, 1).flatten(1))
    x = w.norm(LAYER + "LayerNorm", x + attention, EPS)
    inner = ACTIVATIONS[config.get("hidden_act", "gelu")](w.linear(LAYER + "ffn", x))
    return w.norm(LAYER + "full_layer_layer_norm", x + w.linear(LAYER + "ffn_output", inner), EPS)


def heads(tensors: Mapping[str, Tensor], config: Mapping[str, Any], states: Tensor) -> Dict[str, Tensor]:
    """What the heads that are there make of states ``[T, C]``.

    Returns:
        ``pooled`` ``[C]``; ``words`` ``[T, V]``, scores of all words in the original's order; ``order`` ``[2]``, scores
        of "in order" and "swapped"
    """
    w, found = Doubles(tensors, "albert."), {}
    found["pooled"] = torch.tanh(w.linear("pooler", states[0]))
    if all(f"predictions.{name}" in w for name in _PREDICTIONS):
        hidden = ACTIVATIONS[config.get("hidden_act", "gelu")](w.linear("predictions.dense", states))
        hidden = w.norm("predictions.LayerNorm", hidden, EPS)
        table = w.first("predictions.decoder.weight", "embeddings.word_embeddings.weight")
        found["words"] = w.scores(table, hidden) + w["predictions.bias"]
    if all(f"sop_classifier.classifier.{name}" in w for name in ("weight", "bias")):
        found["order"] = w.linear("sop_classifier.classifier", found["pooled"])
    return found
