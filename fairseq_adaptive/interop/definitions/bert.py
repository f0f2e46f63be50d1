"""BERT (Devlin et al., 2019), RoBERTa (Liu et al., 2019) and Transkimmer (Guan et al., 2022) by Hugging Face's names."""

import math
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.interop.definitions.doubles import ACTIVATIONS, Doubles

PREDICTOR_EPS = 1e-5  # of the LayerNorms in skim predictors: torch's default, as published
_TRANSFORM = ("transform.dense", "transform.LayerNorm")


class Encoded(NamedTuple):
    """
    Attributes:
        states: ``[T, C]``
        depths: ``[T]``, how many layers kept each token
        margin: how far from the threshold the closest decision was; infinity: there was none
        skims: of each skim predictor the states ``[T, C]`` that it read, and its scores ``[T, 2]``: skim, keep
    """

    states: Tensor
    depths: Tensor
    margin: float
    skims: List[Tuple[Tensor, Tensor]]


def encode(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Sequence[int], types=None) -> Encoded:
    """States of one sequence without padding.

    Args:
        tensors: as read, of the body alone or with heads
        config: ``config.json``
        ids: ``[T]``, the original's numbers of tokens
        types: ``[T]``, token types (default: 0); not looked at where there are none

    Raises:
        KeyError: when a tensor is missing
    """
    roberta = config["model_type"] == "roberta"
    w, eps = Doubles(tensors, config["model_type"] + "."), config["layer_norm_eps"]
    first = 2 if roberta else 0  # RoBERTa counts positions from one above the number of <pad>
    x = w.rows("embeddings.word_embeddings.weight", ids)
    x = x + w.rows("embeddings.position_embeddings.weight", range(first, first + len(ids)))
    if config.get("type_vocab_size"):
        x = x + w.rows("embeddings.token_type_embeddings.weight", [0] * len(ids) if types is None else types)
    x = w.norm("embeddings.LayerNorm", x, eps)
    kept, depths = torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.long)
    margin, skims = math.inf, []
    for number in range(config["num_hidden_layers"]):
        predictor = f"encoder.skim_predictors.{number}.predictor."
        if predictor + "0.weight" in w:
            skims.append((x, _predict(w, predictor, x)))
            odds = skims[-1][1].diff(dim=1)[1:, 0]
            asked = kept[1:]  # the first token is never skimmed
            margin = min([margin, *odds[asked].abs().tolist()])
            kept = torch.cat((kept[:1], asked & (odds >= 0)))
        depths += kept
        x = x.clone()  # attention is over kept tokens alone; others stay what they are
        x[kept] = _layer(w, config, f"encoder.layer.{number}.", x[kept])
    return Encoded(x, depths, margin, skims)


def _predict(w, name, x):
    """Scores of skimming and of keeping, [T, 2]: LayerNorm, Linear, LayerNorm, GELU, Linear (section 3.2)."""
    hidden = w.linear(name + "1", w.norm(name + "0", x, PREDICTOR_EPS))
    return w.linear(name + "4", F.gelu(w.norm(name + "2", hidden, PREDICTOR_EPS)))


def _layer(w, config, name, x):
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    query, key, value = (
        w.linear(f"{name}attention.self.{each}", x).unflatten(1, (heads, -1)).transpose(0, 1)
        for each in ("query", "key", "value")
    )
    attention = (query @ key.transpose(1, 2) / math.sqrt(query.size(2))).softmax(-1) @ value
    attention = w.linear(name + "attention.output.dense", attention.transpose(0, 1).flatten(1))
    x = w.norm(name + "attention.output.LayerNorm", x + attention, eps)
    inner = ACTIVATIONS[config.get("hidden_act", "gelu")](w.linear(name + "intermediate.dense", x))
    return w.norm(name + "output.LayerNorm", x + w.linear(name + "output.dense", inner), eps)


def heads(tensors: Mapping[str, Tensor], config: Mapping[str, Any], states: Tensor) -> Dict[str, Tensor]:
    """What the heads that are there make of states ``[T, C]``.

    Returns:
        ``words`` ``[T, V]``, scores of all words in the original's order; ``labels`` ``[L]``, of the sentence; and
        ``spans`` ``[T, 2]``, of an answer's first and last token
    """
    roberta, found = config["model_type"] == "roberta", {}
    w, eps = Doubles(tensors, config["model_type"] + "."), config["layer_norm_eps"]
    head = "lm_head." if roberta else "cls.predictions."
    dense, norm = (head + each for each in (("dense", "layer_norm") if roberta else _TRANSFORM))
    if dense + ".weight" in w:
        # RoBERTa's head has a GELU of its own, whatever its layers have
        activation = F.gelu if roberta else ACTIVATIONS[config.get("hidden_act", "gelu")]
        hidden = w.norm(norm, activation(w.linear(dense, states)), eps)
        table = w.first(head + "decoder.weight", "embeddings.word_embeddings.weight")
        found["words"] = w.scores(table, hidden) + w[w.first(head + "bias", head + "decoder.bias")]
    pooler, out = ("classifier.dense", "classifier.out_proj") if roberta else ("pooler.dense", "classifier")
    if pooler + ".weight" in w and out + ".weight" in w:
        found["labels"] = w.linear(out, torch.tanh(w.linear(pooler, states[0])))
    if "qa_outputs.weight" in w:
        found["spans"] = w.linear("qa_outputs", states)
    return found
