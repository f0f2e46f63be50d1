"""Every model family of the suite as fairseq-train builds it, on generated data of realistic proportions."""

import random
from argparse import ArgumentParser
from pathlib import Path
from typing import Dict, NamedTuple

import numpy as np
from fairseq import options
from fairseq_cli import preprocess

from fairseq_adaptive.ranges import COUNT, FFN_WIDTH, HEADS, LAYERS, POSITIONS, WIDTH, WORDS

CLASSES = 10


class Family(NamedTuple):
    """A family's data, one of :func:`write_data`, and its flags, formatted with the sizes."""

    data: str
    flags: str


_ENCODER = (
    "--encoder-layers {layers} --encoder-embed-dim {dim} --encoder-ffn-embed-dim {ffn} "
    "--encoder-attention-heads {heads} "
)
_DECODER = _ENCODER.replace("encoder", "decoder")
_PAIRS = _ENCODER + _DECODER + "--task translation -s src -t tgt --share-all-embeddings --arch shared_transformer "
_LM = "--decoder-embed-dim {dim} --decoder-ffn-embed-dim {ffn} --decoder-attention-heads {heads} "
_SEGMENTS = (
    _LM + "--task segmented_language_modeling --tokens-per-sample {length} --memory-length {length} "
    "--batch-size {rows} --adaptive-softmax-cutoff {cutoffs} --share-decoder-input-output-embed "
)
_TAPE = (
    "--criterion tape_ponder_loss --tape-tokens 8 --tape-threshold 2 --tape-mlp-dim {ffn} --tape-ffn-embed-dim {ffn} "
)

FAMILIES: Dict[str, Family] = {
    "shared_transformer": Family(
        "pairs",
        _PAIRS + "--encoder-unique-layers {unique} --decoder-unique-layers {unique} --max-tokens {tokens} "
        "--criterion fused_label_smoothed_cross_entropy --label-smoothing 0.1",
    ),
    "universal_transformer": Family(
        "pairs",
        _PAIRS + "--encoder-unique-layers 1 --decoder-unique-layers 1 --max-tokens {tokens} --halting act "
        "--criterion ponder_loss --task-criterion label_smoothed_cross_entropy",
    ),
    "shared_transformer_lm": Family(
        "text",
        _LM + "--task language_modeling --arch shared_transformer_lm --decoder-layers {layers} "
        "--decoder-unique-layers {unique} --decoder-input-dim {dim} --decoder-output-dim {dim} --adaptive-input "
        "--adaptive-input-cutoff {cutoffs} --adaptive-softmax-cutoff {cutoffs} --tokens-per-sample {length} "
        "--batch-size {rows} --criterion adaptive_cross_entropy",
    ),
    "par_transformer_xl": Family(
        "text", _SEGMENTS + "--arch par_transformer_xl --layout af*{layers} --criterion adaptive_cross_entropy"
    ),
    "par_supernet": Family(
        "text",
        _SEGMENTS + "--arch par_supernet --blocks {layers} --criterion architecture_entropy_loss "
        "--entropy-weight 0.1 --target-compute 0.5",
    ),
    "transkimmer": Family(
        "labels",
        _ENCODER + "--task sentence_prediction --num-classes 10 --max-positions 512 --init-token 0 "
        "--arch transkimmer_base --criterion skim_loss --max-tokens {tokens}",
    ),
    "albert_act": Family(
        "text",
        _ENCODER + "--task masked_lm --arch albert_act_base --encoder-input-dim 128 --criterion ponder_loss "
        "--task-criterion masked_lm --tokens-per-sample {length} --batch-size {rows}",
    ),
    "adatape_parity": Family(
        "", _ENCODER + _TAPE + "--task parity --sequence-length 32 --arch adatape_parity --batch-size {sequences}"
    ),
    "adatape_vit": Family(
        "images",
        _ENCODER + _TAPE + "--task image_classification --arch adatape_vit --patch-size 4 "
        "--tape-bank-patch-size 2 --batch-size {images}",
    ),
}
# stock fairseq's models that do the same tasks, and beside which of them each family stands
STOCK: Dict[str, Family] = {
    "transformer": Family(
        "pairs",
        _PAIRS.replace("shared_transformer", "transformer") + "--max-tokens {tokens} "
        "--criterion label_smoothed_cross_entropy --label-smoothing 0.1",
    ),
    "transformer_lm": Family(
        "text",
        _LM + "--task language_modeling --arch transformer_lm --decoder-layers {layers} --decoder-input-dim {dim} "
        "--decoder-output-dim {dim} --adaptive-input --adaptive-input-cutoff {cutoffs} --adaptive-softmax-cutoff {cutoffs} "
        "--tokens-per-sample {length} --batch-size {rows} --criterion adaptive_loss",
    ),
    "roberta": Family(
        "text",
        _ENCODER
        + "--task masked_lm --arch roberta --criterion masked_lm --tokens-per-sample {length} --batch-size {rows}",
    ),
    "roberta_classifier": Family(
        "labels",
        _ENCODER + "--task sentence_prediction --num-classes 10 --max-positions 512 --init-token 0 --arch roberta "
        "--criterion sentence_prediction --max-tokens {tokens}",
    ),
}
BESIDE = {
    "shared_transformer": "transformer",
    "universal_transformer": "transformer",
    "shared_transformer_lm": "transformer_lm",
    "par_transformer_xl": "transformer_lm",
    "par_supernet": "transformer_lm",
    "transkimmer": "roberta_classifier",
    "albert_act": "roberta",
}


def add_sizes(parser: ArgumentParser) -> None:
    """Add the flags that :func:`flags_of` and :func:`write_data` read."""
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--layers", type=LAYERS, default=6, help="depths; of par_transformer_xl, pairs of blocks")
    parser.add_argument("--unique-layers", type=LAYERS, default=3)
    parser.add_argument("--embed-dim", type=WIDTH, default=256)
    parser.add_argument("--ffn-embed-dim", type=FFN_WIDTH, default=1024)
    parser.add_argument("--attention-heads", type=HEADS, default=4)
    parser.add_argument("--vocab-size", type=WORDS, default=8000)
    parser.add_argument("--tokens", type=COUNT, default=2048, help="of a batch; images have 64 patches")
    parser.add_argument("--length", type=POSITIONS, default=128, help="of a segment of text")


def flags_of(name: str, args, folder: Path) -> list:
    """Return the arguments of fairseq-train for a family, or one of :data:`STOCK`: data, task, model and loss."""
    sizes = {
        "layers": args.layers,
        "unique": args.unique_layers,
        "dim": args.embed_dim,
        "ffn": args.ffn_embed_dim,
        "heads": args.attention_heads,
        "tokens": args.tokens,
        "length": args.length,
        "rows": max(1, args.tokens // args.length),
        "sequences": max(1, args.tokens // 32),
        "images": max(1, args.tokens // 64),
        "cutoffs": f"{args.vocab_size // 8},{args.vocab_size // 3}",
    }
    family = {**FAMILIES, **STOCK}[name]
    data = [str(folder / family.data)] if family.data else []
    return [*data, *family.flags.format(**sizes).split()]


def write_data(folder: Path, args) -> None:
    """Write sentence pairs, text, labelled sentences and images; words by Zipf's law, sentences of 10 to 60 words."""
    rng, words = random.Random(1), [f"w{number}" for number in range(args.vocab_size)]
    shares = [1 / (rank + 1) for rank in range(args.vocab_size)]
    once = " ".join(words)  # so that every word is in the dictionary

    def sentences(count):
        return [" ".join(rng.choices(words, shares, k=rng.randint(10, 60))) for _ in range(count)] + [once]

    def binarise(name, *flags, **texts):
        (folder / name).mkdir(parents=True)
        for ending, lines in texts.items():
            (folder / name / f"train.{ending}").write_text("\n".join(lines) + "\n")
        prefix = folder / name / ("train" if len(texts) > 1 else f"train.{next(iter(texts))}")
        command = [*flags, "--trainpref", str(prefix), "--destdir", str(folder / name)]
        preprocess.main(options.get_preprocessing_parser().parse_args(command))

    count = max(100, args.tokens // 4)
    binarise(
        "pairs",
        "--source-lang",
        "src",
        "--target-lang",
        "tgt",
        "--joined-dictionary",
        src=sentences(count),
        tgt=sentences(count),
    )
    binarise("text", "--only-source", txt=sentences(count))
    binarise("labels/input0", "--only-source", input0=sentences(count)[:-1])
    binarise("labels/label", "--only-source", label=[f"class{number % CLASSES}" for number in range(count)])
    generator = np.random.default_rng(1)
    (folder / "images").mkdir()
    images = generator.integers(0, 256, (args.tokens // 4, 32, 32, 3)).astype(np.uint8)
    np.savez(folder / "images" / "train.npz", images=images, labels=np.arange(len(images)) % CLASSES)
