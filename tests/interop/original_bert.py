"""Weights and folders of small BERTs, RoBERTas and Transkimmers, by the names of Hugging Face."""

import json
from argparse import Namespace

import torch

DIM, INNER, LAYERS, WORDS = 8, 12, 3, 30
CONFIG = {
    "model_type": "bert",
    "vocab_size": WORDS,
    "hidden_size": DIM,
    "intermediate_size": INNER,
    "hidden_act": "gelu",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
ROBERTA = {
    **CONFIG,
    "model_type": "roberta",
    "max_position_embeddings": 18,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
NAMES = {  # of the heads: for words, its LayerNorm and bias; for sentences
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
}
SENTENCE = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}
SPECIAL = {
    "bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}
LINEARS = {
    "attention.self.query": (DIM, DIM),
    "attention.self.key": (DIM, DIM),
    "attention.self.value": (DIM, DIM),
    "attention.output.dense": (DIM, DIM),
    "intermediate.dense": (INNER, DIM),
    "output.dense": (DIM, INNER),
}


def random_weights(config, skims=False, head=True):
    """Names and shapes as Hugging Face saves them."""
    generator = torch.Generator().manual_seed(1)
    kind, weights = config["model_type"], {}

    def linear(name, *shape):
        weights[name + ".weight"] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        weights[name + ".bias"] = torch.randn(shape[0], generator=generator) / 5

    def norm(name):
        weights[name + ".weight"] = 1 + torch.randn(DIM, generator=generator) / 5
        weights[name + ".bias"] = torch.randn(DIM, generator=generator) / 5

    rows = (
        ("word", WORDS),
        ("position", config["max_position_embeddings"]),
        ("token_type", config.get("type_vocab_size", 0)),
    )
    for name, size in rows:
        if size:
            weights[f"{kind}.embeddings.{name}_embeddings.weight"] = torch.randn(size, DIM, generator=generator)
    norm(f"{kind}.embeddings.LayerNorm")
    for number in range(config["num_hidden_layers"]):
        prefix = f"{kind}.encoder.layer.{number}."
        for name, shape in LINEARS.items():
            linear(prefix + name, *shape)
        norm(prefix + "attention.output.LayerNorm"), norm(prefix + "output.LayerNorm")
        if skims:
            prefix = f"{kind}.encoder.skim_predictors.{number}.predictor."
            norm(prefix + "0"), norm(prefix + "2"), linear(prefix + "1", DIM, DIM), linear(prefix + "4", 2, DIM)
    if head:
        dense, layer_norm, bias = NAMES[kind]
        linear(dense, DIM, DIM), norm(layer_norm)
        weights[bias] = torch.randn(WORDS, generator=generator)
        linear("qa_outputs", 2, DIM)
        dense, out = SENTENCE[kind]
        linear(dense, DIM, DIM), linear(out, 3, DIM)
    return weights


def symbols(kind):
    special = SPECIAL[kind]
    if kind == "roberta":
        return [*special[:4], *(f"Ġw{number}" for number in range(WORDS - 5)), special[4]]
    words = [f"##w{number}" for number in range(WORDS)]
    for number, symbol in zip((10, 0, 11, 12, 13), special):
        words[number] = symbol
    return words


def write(folder, config, weights, words=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    words = words or symbols(config["model_type"])
    if config["model_type"] == "bert":
        (folder / "vocab.txt").write_text("".join(word + "\n" for word in words))
    else:
        (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    return Namespace(format=config["model_type"], input=folder, vocab=None)
