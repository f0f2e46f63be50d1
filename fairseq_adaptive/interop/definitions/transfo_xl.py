"""Transformer-XL (Dai et al., 2019) with the adaptive softmax of Grave et al. (2017), by the authors' weight names."""

import math
from typing import Any, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.interop.definitions.doubles import Doubles

EPS = 1e-5  # of all LayerNorms


def log_probabilities(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    words: Sequence[int],
    segment: int,
    is_reversed: bool = False,
) -> Tensor:
    """Log-probabilities ``[T, V]`` of the word after each of ``words``, given all before it that memory reaches.

    Args:
        tensors: as read, with Hugging Face's or the authors' names
        config: ``config.json``
        words: ``[T]``, the original's numbers
        segment: how many words are read at a time; the memory is empty before the first segment
        is_reversed: the rows of ``cluster_weight`` are those of the last cluster first

    Raises:
        KeyError: when a tensor is missing
    """
    w, dim = Doubles(tensors, "transformer."), config["d_model"]
    memories = [torch.zeros(0, dim, dtype=torch.float64)] * config["n_layer"]
    found = []
    for first in range(0, len(words), segment):
        x = torch.stack([_embedding(w, config, word) for word in words[first : first + segment]])
        for layer, memory in enumerate(memories):
            past = torch.cat((memory, x))
            memories[layer] = past[max(0, len(past) - config["mem_len"]) :]
            x = _attention(w, config, f"layers.{layer}.dec_attn", past, len(x))
            name = f"layers.{layer}.pos_ff"
            inner = F.relu(w.linear(name + ".CoreNet.0", x))
            x = w.norm(name + ".layer_norm", x + w.linear(name + ".CoreNet.3", inner), EPS)
        found.append(_softmax(w, config, x, is_reversed))
    return torch.cat(found)


def _clusters(config):
    """Where each cluster of words begins and ends."""
    ends = [*config.get("cutoffs", []), config.get("vocab_size", config.get("n_token"))]
    return list(zip([0, *ends], ends))


def _embedding(w, config, word):
    """[C], scaled by the root of C."""
    if config.get("div_val", 1) == 1:
        row = w.rows("word_emb.emb_layers.0.weight", word)
    else:
        cluster, start = next((c, start) for c, (start, end) in enumerate(_clusters(config)) if word < end)
        row = w.rows(f"word_emb.emb_layers.{cluster}.weight", word - start)
        row = w[f"word_emb.emb_projs.{cluster}"] @ row
    return row * math.sqrt(config["d_model"])


def _attention(w, config, name, past, count):
    """Attention of the last ``count`` of the states ``past`` [M + T, C] to all up to each (section 3.3), residual and
    LayerNorm: [T, C]."""
    heads, width, total = config["n_head"], config["d_head"], len(past)
    query, key, value = (past @ w[name + ".qkv_net.weight"].T).view(total, 3, heads, width).unbind(1)
    distances = torch.stack([_position(config, distance) for distance in range(total)])
    r = (distances @ w[name + ".r_net.weight"].T).view(total, heads, width)
    # one pair for all layers, which each layer may list as its own
    untied = config.get("untie_r", "r_w_bias" not in w)
    own = [f"{name}.{bias}" for bias in ("r_w_bias", "r_r_bias")]
    u, v = (w[each if untied else w.first(each.rpartition(".")[2], each)] for each in own)
    rows = []
    for i in range(total - count, total):
        seen = [j for j in range(i + 1) if not config.get("same_length") or j > i - config["mem_len"]]
        away = [i - j for j in seen]
        scores = ((query[i] + u) * key[seen] + (query[i] + v) * r[away]).sum(-1) / math.sqrt(width)
        rows.append((scores.softmax(0)[..., None] * value[seen]).sum(0).flatten())
    x = past[total - count :] + torch.stack(rows) @ w[name + ".o_net.weight"].T
    return w.norm(name + ".layer_norm", x, EPS)


def _position(config, distance):
    """Sines, then cosines, of a distance: [C]."""
    if config.get("clamp_len", -1) > 0:
        distance = min(distance, config["clamp_len"])
    dim = config["d_model"]
    angles = distance * (1 / 10000 ** (torch.arange(0.0, dim, 2.0) / dim)).double()
    return torch.cat((angles.sin(), angles.cos()))


def _softmax(w, config, x, is_reversed):
    """[T, C] to [T, V]: the first cluster's words beside one entry for each other cluster, within which are its words."""
    clusters = _clusters(config)
    head = _scores(w, config, x, 0, *clusters[0])
    if len(clusters) == 1:
        return head.log_softmax(1)
    tails = F.linear(_projected(w, config, x, 0), w["crit.cluster_weight"], w["crit.cluster_bias"])
    head = torch.cat((head, tails.flip(1) if is_reversed else tails), 1).log_softmax(1)
    size = clusters[0][1]
    found = [head[:, :size]]
    for number, rows in enumerate(clusters[1:], 1):
        within = _scores(w, config, x, number, *rows).log_softmax(1)
        found.append(head[:, size + number - 1, None] + within)
    return torch.cat(found, 1)


def _scores(w, config, x, cluster, start, end):
    """Scores [T, R] of the words of a cluster, which has a table of its own or rows of the only one; where input and output
    are tied, a file may hold tables once."""
    number, rows = (0, (start, end)) if config.get("div_val", 1) == 1 else (cluster, (0, None))
    table = w.first(f"crit.out_layers.{number}.weight", f"word_emb.emb_layers.{number}.weight")
    bias = w[f"crit.out_layers.{number}.bias"][slice(*rows)]
    return w.scores(table, _projected(w, config, x, cluster), *rows) + bias


def _projected(w, config, x, cluster):
    """[T, C] to [T, E], the width of the cluster's embeddings."""
    if config.get("div_val", 1) == 1:
        return x
    return x @ w[w.first(f"crit.out_projs.{cluster}", f"word_emb.emb_projs.{cluster}")]
