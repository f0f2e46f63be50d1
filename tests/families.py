"""Every model family as fairseq-train builds it, tiny, on generated data and within this process."""

import random
from typing import NamedTuple

import numpy as np
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from fairseq_cli import preprocess


class Family(NamedTuple):
    """The data of a family, a name in :func:`write_data`, and its flags."""

    data: str
    flags: str


def _both(**sizes):
    return " ".join(
        f"--{side}-{name.replace('_', '-')} {value}" for side in ("encoder", "decoder") for name, value in sizes.items()
    )


_TRANSLATION = "--task translation -s src -t tgt --share-all-embeddings --batch-size 24 " + _both(
    embed_dim=32, ffn_embed_dim=64, attention_heads=2, layers=4
)
_DECODER = "--decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2"
_ENCODER = "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2"
_SEGMENTS = (
    "--task segmented_language_modeling --tokens-per-sample 12 --batch-size 12 --memory-length 12 "
    "--adaptive-softmax-cutoff 10,20 --share-decoder-input-output-embed --decoder-normalize-before "
    f"{_DECODER}"
)

FAMILIES = {
    "shared_transformer": Family(
        "pairs",
        f"{_TRANSLATION} --arch shared_transformer {_both(unique_layers=2)} "
        "--criterion fused_label_smoothed_cross_entropy --label-smoothing 0.1",
    ),
    "universal_transformer": Family(
        "pairs",
        f"{_TRANSLATION} --arch shared_transformer {_both(unique_layers=1)} "
        "--halting act --criterion ponder_loss --time-penalty 0.05 "
        "--task-criterion label_smoothed_cross_entropy",
    ),
    "pondernet": Family(
        "pairs",
        f"{_TRANSLATION} --arch shared_transformer {_both(unique_layers=1)} "
        "--halting pondernet --criterion ponder_loss --kl-weight 0.1",
    ),
    "shared_transformer_lm": Family(
        "text",
        "--task language_modeling --arch shared_transformer_lm --decoder-layers 4 --decoder-unique-layers 2 "
        f"{_DECODER} --decoder-input-dim 32 --decoder-output-dim 32 --adaptive-input --adaptive-input-cutoff 10,20 "
        "--adaptive-softmax-cutoff 10,20 --tokens-per-sample 24 --batch-size 10 --criterion adaptive_cross_entropy",
    ),
    "par_transformer_xl": Family(
        "text", f"{_SEGMENTS} --arch par_transformer_xl --layout aff*2 --criterion adaptive_cross_entropy"
    ),
    "par_supernet": Family(
        "text",
        f"{_SEGMENTS} --arch par_supernet --blocks 3 --criterion architecture_entropy_loss "
        "--entropy-weight 0.1 --target-compute 0.5",
    ),
    "transkimmer": Family(
        "labels",
        "--task sentence_prediction --num-classes 2 --max-positions 32 --init-token 0 "
        f"--arch transkimmer_base --encoder-layers 2 {_ENCODER} --criterion skim_loss "
        "--skim-factor 0.5 --batch-size 48 --lr 0.001",
    ),
    "albert_act": Family(
        "text",
        f"--task masked_lm --arch albert_act_tiny {_ENCODER} --encoder-input-dim 16 "
        "--encoder-layers 4 --criterion ponder_loss --task-criterion masked_lm --tokens-per-sample 24 "
        "--sample-break-mode eos --batch-size 24",
    ),
    "adatape_parity": Family(
        "",
        f"--task parity --sequence-length 8 --train-examples 640 --arch adatape_parity "
        f"{_ENCODER} --tape-mlp-dim 32 --tape-ffn-embed-dim 32 --tape-tokens 4 --tape-threshold 2 "
        "--criterion tape_ponder_loss --batch-size 32",
    ),
    "adatape_vit": Family(
        "images",
        f"--task image_classification --arch adatape_vit {_ENCODER} --encoder-layers 3 "
        "--patch-size 4 --tape-bank-patch-size 2 --tape-tokens 4 --tape-threshold 2 "
        "--criterion tape_ponder_loss --batch-size 32",
    ),
}
# further ones that golden losses are kept of: the policies of other papers, and several at once
_LM = (
    f"--task language_modeling {_DECODER} --decoder-input-dim 32 --decoder-output-dim 32 --tokens-per-sample 24 "
    "--batch-size 10 --criterion adaptive_compute_loss"
)
COMPOSITIONS = {
    "mixture_of_depths_lm": Family(
        "text", f"{_LM} --arch mixture_of_depths_lm_tiny --decoder-layers 4 --decoder-unique-layers 4"
    ),
    "mixture_of_recursions_lm": Family(
        "text", f"{_LM} --arch mixture_of_recursions_lm_tiny --decoder-layers 4 --decoder-unique-layers 3"
    ),
    "token_choice_lm": Family(
        "text",
        f"{_LM} --arch mixture_of_recursions_lm_tiny --decoder-layers 4 --decoder-unique-layers 3 "
        "--router token_choice --router-kv recompute --halting act --halting-kv keep",
    ),
    "mixture_of_recursions": Family(
        "pairs",
        f"{_TRANSLATION} --arch mixture_of_recursions_tiny {_both(layers=4, unique_layers=3)} "
        "--criterion adaptive_compute_loss --task-criterion label_smoothed_cross_entropy",
    ),
    "skimming_decoder": Family(
        "pairs",
        f"{_TRANSLATION} --arch shared_transformer {_both(unique_layers=2)} --router skimming --halting ut_act "
        '--router-args {"bias":1.0} --encoder-reader tape --encoder-reader-args {"tokens":4,"bank_size":20,"depth":1} '
        "--criterion adaptive_compute_loss --task-criterion label_smoothed_cross_entropy",
    ),
    "halting_transformer_xl": Family(
        "text",
        f"{_SEGMENTS} --arch par_transformer_xl --layout af*3 --decoder-unique-layers 2 --halting act "
        "--criterion adaptive_compute_loss --task-criterion adaptive_cross_entropy",
    ),
}
# a family's own flags come last
_COMMON = (
    "--optimizer adam --lr 0.003 --clip-norm 1 --seed 1 --num-workers 0 --required-batch-size-multiple 1 "
    "--dropout 0 --attention-dropout 0 --activation-dropout 0"
)


def write_data(folder):
    """Write what the families train on, each learnable, to sub-folders of ``folder``."""
    rng = random.Random(1)

    def lines(count, longest, words):
        return [" ".join(f"w{rng.randrange(words):02d}" for _ in range(rng.randint(3, longest))) for _ in range(count)]

    def binarise(name, *flags, **texts):
        (folder / name).mkdir(parents=True)
        for ending, text in texts.items():
            (folder / name / f"train.{ending}").write_text("\n".join(text) + "\n")
        only = ["--only-source"] if len(texts) == 1 else []
        prefix = folder / name / ("train" if not only else f"train.{next(iter(texts))}")
        command = [*only, *flags, "--trainpref", prefix, "--destdir", folder / name]
        preprocess.main(options.get_preprocessing_parser().parse_args([str(each) for each in command]))

    source = lines(600, 9, 30)
    binarise(
        "pairs",
        "--source-lang",
        "src",
        "--target-lang",
        "tgt",
        "--joined-dictionary",
        src=source,
        tgt=[" ".join(reversed(line.split())) for line in source],
    )
    binarise(
        "text",
        txt=[
            " ".join(f"w{(start + place) % 30:02d}" for place in range(rng.randint(8, 20)))
            for start in rng.choices(range(30), k=600)
        ],
    )
    labels = rng.choices(("good", "bad"), k=800)
    binarise("labels/input0", input0=[f"{line} {label}" for line, label in zip(lines(800, 9, 20), labels)])
    binarise("labels/label", label=labels)
    generator = np.random.default_rng(1)
    (folder / "images").mkdir()
    classes = generator.integers(0, 4, 640)
    images = generator.integers(0, 100, (640, 8, 8)) + 40 * classes[:, None, None]
    np.savez(folder / "images" / "train.npz", images=images.astype(np.uint8), labels=classes)
    return folder


def build_trainer(name, folder, *flags):
    """Return the trainer of a family or composition, and its batches in the order in which they would be trained on."""
    family = {**FAMILIES, **COMPOSITIONS}[name]
    data = [str(folder / family.data)] if family.data else []
    command = [*data, *_COMMON.split(), *family.flags.split(), *flags]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    task.load_dataset("train")
    trainer = Trainer(cfg, task, model, criterion)
    batches = trainer.get_train_iterator(1).next_epoch_itr(shuffle=True)
    trainer.begin_epoch(1)
    return trainer, batches


def train(trainer, batches, updates):
    """Return what was logged of each update, a dict from names to numbers."""
    logged = []
    for _, batch in zip(range(updates), batches):
        with metrics.aggregate(new_root=True) as log:
            trainer.train_step([batch])
        logged.append(
            {
                key: float(value)
                for key, value in log.get_smoothed_values().items()
                if isinstance(value, (int, float, torch.Tensor))
            }
        )
    return logged
