"""A checkpoint of a plain post-LN Transformer as a model of Marian, and its search through pymarian, a peer of decoding.py.

Marian counts positions from 0 where fairseq starts at 2, and begins a sentence with zeros where fairseq has the embedding of
``</s>``. So the weights are trained some updates more, by Marian, until they know that; they find similar hypotheses there, not
the same ones. With pre-LN the search of Marian 1.12 does not normalise the keys of earlier tokens, so that its hypotheses mean
nothing. A search has one thread.
"""

import json
import os
from typing import Any, Dict

import numpy as np

from fairseq_adaptive.files import whole_file, whole_folder
from fairseq_adaptive.interop.checkpoint import given_options

MODULES = {"encoder": {"self_attn": "self"}, "decoder": {"self_attn": "self", "encoder_attn": "context"}}
MAPS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
# flags of fairseq, with the values that the conversion takes for granted
WANTED = {
    "encoder_normalize_before": False,
    "decoder_normalize_before": False,
    "encoder_learned_pos": False,
    "decoder_learned_pos": False,
    "layernorm_embedding": False,
    "no_scale_embedding": False,
    "no_token_positional_embeddings": False,
    "share_all_embeddings": True,
    "activation_fn": "relu",
}


def obstacle(state: Dict[str, Any]) -> str:
    """Why there is no Marian here, or no such model in it; empty: there is."""
    try:
        import pymarian  # noqa: F401
    except ImportError:
        return "pymarian is not installed"
    given = given_options(state)
    for name, wanted in WANTED.items():
        if given.get(name, wanted) != wanted:
            return f"its model would not be the same with {name} = {given[name]}"
    sides = [
        [given[f"{side}_{name}"] for name in ("embed_dim", "ffn_embed_dim", "attention_heads")] for side in MODULES
    ]
    return "" if sides[0] == sides[1] else "encoder and decoder have other sizes"


def tensors(state: Dict[str, Any]) -> Dict[str, np.ndarray]:
    """The weights under Marian's names; maps are input x output there, vectors 1 x width.

    Args:
        state: from ``unroll_checkpoint``
    """
    model, given, found = (
        {name: each.float().numpy() for name, each in state["model"].items()},
        given_options(state),
        {},
    )

    def put(name, theirs, weight="W", bias="b"):
        weights = model[f"{name}.weight"]
        found[theirs.format(weight)] = weights.T.copy() if weights.ndim == 2 else weights[None]
        found[theirs.format(bias)] = model[f"{name}.bias"][None]

    for side, attentions in MODULES.items():
        for depth in range(given[f"{side}_layers"]):
            layer, to = f"{side}.layers.{depth}", f"{side}_l{depth + 1}"
            for name, theirs in attentions.items():
                for each, letter in MAPS.items():
                    put(f"{layer}.{name}.{each}", f"{to}_{theirs}_{{}}{letter}")
                put(f"{layer}.{name}_layer_norm", f"{to}_{theirs}_Wo_ln_{{}}", "scale", "bias")
            for number in "12":
                put(f"{layer}.fc{number}", f"{to}_ffn_{{}}{number}")
            put(f"{layer}.final_layer_norm", f"{to}_ffn_ffn_ln_{{}}", "scale", "bias")
    found["Wemb"] = model["encoder.embed_tokens.weight"][2:]  # </s>, <unk> and words; no <s>, no <pad>
    found["decoder_ff_logit_out_b"] = np.zeros((1, len(found["Wemb"])), np.float32)
    return found


def settings(state: Dict[str, Any], words: int) -> Dict[str, Any]:
    """What Marian must know of a model, beside what it has by default."""
    given = given_options(state)
    return {
        "type": "transformer",
        "dim-vocabs": [words, words],
        "dim-emb": given["encoder_embed_dim"],
        "enc-depth": given["encoder_layers"],
        "dec-depth": given["decoder_layers"],
        "transformer-heads": given["encoder_attention_heads"],
        "transformer-dim-ffn": given["encoder_ffn_embed_dim"],
        "transformer-ffn-activation": "relu",
        "transformer-preprocess": "",
        "transformer-postprocess": "dan",
        "transformer-postprocess-emb": "d",
        "tied-embeddings-all": True,
        "version": "v1.12.0",
    }


def write_model(state: Dict[str, Any], dictionary, folder) -> None:
    """Write ``model.npz`` and ``words.yml`` into a new folder."""
    found = tensors(state)
    about = json.dumps(settings(state, len(found["Wemb"])))  # which is YAML, too
    words = [dictionary[number] for number in range(2, len(dictionary))]
    with whole_folder(folder) as made:
        stored = {**found, "special:model.yml": np.frombuffer(about.encode() + b"\0", np.int8)}
        np.savez(os.path.join(made, "model.npz"), **stored)
        with open(os.path.join(made, "words.yml"), "w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(word, ensure_ascii=False)}: {number}\n" for number, word in enumerate(words))


def adapt(folder, state: Dict[str, Any], pairs, updates: int) -> None:
    """Train the model of a folder, by Marian.

    Args:
        folder: of :func:`write_model`
        state: of which the model is
        pairs: words of sentences and of their translations
        updates: of 64 pairs each
    """
    import pymarian

    for side, texts in zip(("source", "target"), zip(*pairs)):
        with whole_file(f"{folder}/{side}") as part, open(part, "w", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in texts)
    sizes = {
        name: value
        for name, value in settings(state, 0).items()
        if name not in ("dim-vocabs", "version") and value != ""
    }
    flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in sizes.items())
    model, words = f"{folder}/model.npz", f"{folder}/words.yml"
    pymarian.Trainer(
        f"{flags} --model {folder}/adapted.npz --pretrained-model {model} --train-sets {folder}/source {folder}/target "
        f"--vocabs {words} {words} --after-batches {updates} --mini-batch 64 --max-length 200 --cpu-threads 1 --workspace 1000 "
        "--learn-rate 0.0005 --lr-warmup 20 --label-smoothing 0.1 --clip-norm 1 --cost-type ce-mean-words --seed 1 --quiet"
    ).train()
    os.replace(f"{folder}/adapted.npz", model)


def search(folder, dictionary, beam: int):
    """``decode(samples)``, which returns the words of the best hypothesis of each sentence; a sample is a batch.

    Args:
        folder: of :func:`write_model`
    """
    import pymarian

    words = f"{folder}/words.yml"
    translator = pymarian.Translator(
        f"--models {folder}/model.npz --vocabs {words} {words} --beam-size {beam} --normalize 1 --allow-unk --quiet "
        f"--cpu-threads 1 --mini-batch 100000 --maxi-batch 1 --workspace 512"
    )

    def decode(samples):
        found = []
        for sample in samples:
            rows = sample["net_input"]["src_tokens"]
            texts = [dictionary.string(row[row != dictionary.pad()]) for row in rows]
            found += [text.split() for text in translator.translate(texts)]
        return found

    return decode
