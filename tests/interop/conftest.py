import argparse

import pytest
import torch

SIDES = ("encoder", "decoder")
TINY = {
    f"{side}_{name}": value
    for side in SIDES
    for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 5}.items()
}


@pytest.fixture
def flags_of():
    """``flags_of(unique, strategy, flag=value ...)``: flags of a tiny ``shared_transformer`` of 5 depths."""

    def flags_of(unique=2, strategy="cycle_rev", **flags):
        return {
            **TINY,
            "encoder_unique_layers": unique,
            "decoder_unique_layers": unique,
            "layer_sharing": strategy,
            "max_source_positions": 64,
            "max_target_positions": 64,
            **flags,
        }

    return flags_of


@pytest.fixture
def checkpoint(build):
    """``checkpoint(arch, flag=value ...)``: a model and its checkpoint, with the entries of fairseq's trainer."""

    def checkpoint(arch, task="translation", dtype=torch.float32, seed=1, **flags):
        model = build(arch, dtype=dtype, seed=seed, **flags)
        return model, {
            "args": None,
            "cfg": {
                "common": {"user_dir": "/somewhere/fairseq_adaptive"},
                "model": argparse.Namespace(arch=arch, _name=arch, **flags),
                "task": {"_name": task, "source_lang": "src", "target_lang": "tgt"},
            },
            "model": model.state_dict(),
            "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 7}],
            "extra_state": {"train_iterator": {"epoch": 3}},
            "task_state": {},
            "last_optimizer_state": {"step": torch.ones(3)},
        }

    return checkpoint


@pytest.fixture
def data_dir(tmp_path, dictionary):
    """A folder with dictionaries, as ``fairseq-preprocess`` writes it."""
    folder = tmp_path / "data-bin"
    folder.mkdir()
    for name in ("dict.src.txt", "dict.tgt.txt", "dict.txt"):
        dictionary.save(str(folder / name))
    return folder


@pytest.fixture(scope="session")
def spm(tmp_path_factory):
    """A SentencePiece model of 60 pieces with the special pieces of ALBERT."""
    from sentencepiece import SentencePieceTrainer

    base = tmp_path_factory.mktemp("spm")
    (base / "text").write_text("\n".join("the quick brown fox jumps over a lazy dog again and again".split()) + "\n")
    SentencePieceTrainer.train(
        input=str(base / "text"),
        model_prefix=str(base / "spiece"),
        vocab_size=60,
        model_type="bpe",
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="<pad>",
        unk_piece="<unk>",
        control_symbols="[CLS],[SEP],[MASK]",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return base / "spiece.model"
