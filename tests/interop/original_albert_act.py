"""Weights of a small ALBERT-ACT, by the names of asi/albert-act-base."""

import torch

CONFIG = {
    "vocab_size": 60,
    "embedding_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
    "classifier_dropout_prob": 0.1,
    "max_position_embeddings": 40,
    "act_epsilon": 0.01,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def published_weights(seed=1, heads=False):
    """Names and shapes as the public model saves them; ``heads`` are those of pretraining."""
    generator = torch.Generator().manual_seed(seed)
    linears = {"encoder.embedding_hidden_mapping_in": (16, 8), "pooler": (16, 16)}
    layer = {f"attention.{name}": (16, 16) for name in ("query", "key", "value", "dense")}
    layer.update({"ffn": (32, 16), "ffn_output": (16, 32), "act.dense": (1, 16)})
    linears.update({f"encoder.albert_layer.{name}": shape for name, shape in layer.items()})
    weights = {
        f"embeddings.{name}_embeddings.weight": torch.randn(size, 8, generator=generator)
        for name, size in (("word", 60), ("position", 40), ("token_type", 2))
    }
    for name, shape in linears.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 5
    weights["encoder.albert_layer.act.dense.bias"] -= 1.5
    norms = (
        ("embeddings.LayerNorm", 8),
        ("encoder.albert_layer.LayerNorm", 16),
        ("encoder.albert_layer.full_layer_layer_norm", 16),
    )
    for name, width in norms:
        weights[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) / 5
        weights[f"{name}.bias"] = torch.randn(width, generator=generator) / 5
    if heads:
        weights["predictions.bias"] = torch.randn(60, generator=generator) / 5
        for name, shape in {"predictions.dense": (8, 16), "sop_classifier.classifier": (2, 16)}.items():
            weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / 4
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 5
        weights["predictions.LayerNorm.weight"] = 1 + torch.randn(8, generator=generator) / 5
        weights["predictions.LayerNorm.bias"] = torch.randn(8, generator=generator) / 5
    return weights
