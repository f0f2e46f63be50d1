"""For every family of ours and the tasks and criterions of fairseq that run on generated data: what was saved loads."""

import copy
import shutil

import families
import numpy as np
import pytest
import torch
from compat.same import differences
from families import FAMILIES, Family
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from fairseq_cli import train

_SIZES = families._both(embed_dim=16, ffn_embed_dim=16, attention_heads=2, layers=1)
_PAIRS = f"-s src -t tgt --batch-size 24 --share-all-embeddings {_SIZES}"
_BLEU = '--eval-bleu --eval-bleu-args {"beam":2,"max_len_a":0,"max_len_b":9}'
_TRANSLATION = f"--task translation --arch transformer {_PAIRS} {_BLEU}"
_ROBERTA = (
    "--arch roberta_base --encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 16 "
    "--encoder-attention-heads 2 --batch-size 48 --max-positions 32"
)
_SENTENCES = f"--task sentence_prediction --init-token 0 --criterion sentence_prediction {_ROBERTA}"
_LM = (
    "--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 --decoder-ffn-embed-dim 16 "
    "--decoder-attention-heads 2 --tokens-per-sample 24 --batch-size 24"
)
_BART = (
    f"--arch bart_base {_SIZES} --tokens-per-sample 24 --batch-size 24 --max-source-positions 64 "
    "--max-target-positions 64 --criterion cross_entropy"
)


def _best(metric):
    return f"--best-checkpoint-metric {metric} --maximize-best-checkpoint-metric"


STOCK = {
    "bleu": Family("pairs", f"{_TRANSLATION} --criterion cross_entropy"),
    "bleu, detokenised": Family(
        "pairs",
        f"{_TRANSLATION} --criterion label_smoothed_cross_entropy --report-accuracy "
        f"--label-smoothing 0.1 --eval-bleu-detok moses {_best('bleu')}",
    ),
    "bleu, tokenised": Family(
        "pairs",
        f"{_TRANSLATION} --criterion fused_label_smoothed_cross_entropy --eval-tokenized-bleu --eval-bleu-remove-bpe",
    ),
    "r-drop": Family("pairs", f"{_TRANSLATION} --criterion label_smoothed_cross_entropy_with_rdrop"),
    "composite": Family(
        "pairs",
        f"--task translation --arch transformer {_PAIRS} --criterion composite_loss "
        "--underlying-criterion cross_entropy",
    ),
    "alignment": Family(
        "pairs",
        f"--task translation --arch transformer_align {_PAIRS} {_BLEU} --load-alignments "
        "--criterion label_smoothed_cross_entropy_with_alignment --alignment-layer 0 "
        "--alignment-heads 1",
    ),
    "levenshtein": Family(
        "pairs", f"--task translation_lev --arch cmlm_transformer {_PAIRS} --criterion nat_loss --noise random_mask"
    ),
    "multilingual": Family(
        "pairs",
        "--task multilingual_translation --lang-pairs src-tgt --batch-size 24 "
        f"--arch multilingual_transformer {_SIZES} --criterion cross_entropy",
    ),
    "classes": Family("classes", f"{_SENTENCES} --num-classes 2"),
    "mcc": Family("classes", f"{_SENTENCES} --num-classes 2 --report-mcc {_best('mcc')}"),
    "f1": Family("classes", f"{_SENTENCES} --num-classes 2 --report-acc-and-f1 {_best('f1')}"),
    "correlation": Family(
        "numbers", f"{_SENTENCES} --num-classes 1 --regression-target --report-pearson-and-spearman {_best('pearson')}"
    ),
    "language model": Family("text", f"--task language_modeling {_LM} --criterion cross_entropy"),
    "adaptive": Family(
        "text",
        f"--task language_modeling {_LM} --criterion adaptive_loss "
        "--adaptive-softmax-cutoff 10,20 --ddp-backend legacy_ddp",
    ),
    "masked": Family(
        "text", f"--task masked_lm --criterion masked_lm --tokens-per-sample 24 --sample-break-mode eos {_ROBERTA}"
    ),
    "order": Family(
        "text",
        "--task masked_lm_sop --arch albert_act_tiny --encoder-layers 2 --encoder-embed-dim 16 "
        "--encoder-ffn-embed-dim 16 --encoder-attention-heads 2 --criterion masked_lm_sop "
        "--tokens-per-sample 48 --batch-size 24",
    ),
    "denoising": Family("text", f"--task denoising --mask 0.1 {_BART}"),
    "spans": Family("text", f"--task span_masked_lm {_BART}"),
    "dummies": Family("", f"--task dummy_lm --dataset-size 100 --dict-size 90 {_LM} --criterion cross_entropy"),
    "plateau": Family(
        "text",
        f"--task language_modeling {_LM} --criterion cross_entropy --store-ema "
        "--lr-scheduler reduce_lr_on_plateau --optimizer adafactor --scale-parameter",
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = families.write_data(tmp_path_factory.mktemp("data"))
    (folder / "pairs/train.align.src-tgt").write_text("0-0\n" * 600)
    for name in "classes", "numbers":
        shutil.copytree(folder / "labels", folder / name)
    dictionary = folder / "classes/label/dict.txt"
    dictionary.write_text(dictionary.read_text().replace("good", "0").replace("bad", "1"))
    shutil.rmtree(folder / "numbers/label")
    (folder / "numbers/label").mkdir()
    (folder / "numbers/label/train.label").write_text("".join(f"{number % 7 / 7}\n" for number in range(800)))
    return folder


def _log_numpy(monkeypatch):
    """Every criterion also logs NumPy's numbers and arrays, as one of a user's own may."""
    stock = Trainer._reduce_and_log_stats

    def reduce_and_log_stats(self, *args, **kwargs):
        metrics.log_scalar("_counts", np.array([1, 2]))
        metrics.log_scalar("_share", np.array([0.1], np.float32), weight=np.int64(3))
        metrics.log_scalar("_number", np.float64(0.3))
        metrics.log_scalar_sum("_sum", np.array(2.5))
        metrics.log_speed("_speed", np.int64(4))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_reduce_and_log_stats", reduce_and_log_stats)


@pytest.mark.parametrize("name", [*FAMILIES, *STOCK])
def test_what_a_training_saves_loads(name, data, monkeypatch, tmp_path):
    family = {**FAMILIES, **STOCK}[name]
    command = [
        *([str(data / family.data)] if family.data else []),
        *families._COMMON.split(),
        *family.flags.split(),
        "--max-update",
        "2",
        "--valid-subset",
        "train",
        "--max-valid-steps",
        "2",
        "--cpu",
        "--log-format",
        "none",
        "--no-epoch-checkpoints",
        "--save-dir",
        str(tmp_path),
    ]
    saved, stock = {}, checkpoint_utils.torch_persistent_save

    def torch_persistent_save(obj, filename, *args, **kwargs):
        saved[filename] = copy.deepcopy(obj)
        return stock(obj, filename, *args, **kwargs)

    monkeypatch.setattr(checkpoint_utils, "torch_persistent_save", torch_persistent_save)
    monkeypatch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)
    _log_numpy(monkeypatch)
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
    train.main(cfg)
    ((path, state),) = saved.items()

    torch.load(path, weights_only=True)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(path)
    for part in sorted(set(state) - {"args", "cfg"}):
        assert differences(loaded[part], state[part], part) == []
    kept = loaded["extra_state"]["metrics"]
    assert "valid" in kept and all(
        type(meter[3][key]) is np.ndarray
        for log in kept.values()
        for meter in log
        for key in ("sum",)
        if meter[1] in ("_counts", "_share", "_bleu_counts", "_bleu_totals")
    )

    metrics.load_state_dict(kept)
    resumed = metrics.state_dict()
    for log in kept:
        for one, other in zip(resumed[log], kept[log]):
            differ = {key for key in other[3] if differences(one[3][key], other[3][key])}
            assert one[:3] == other[:3] and differ <= {"init"}  # of a clock that runs
    metrics.reset()
