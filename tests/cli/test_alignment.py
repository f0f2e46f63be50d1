"""Training on word alignments and printing them, through the stock commands, with and without halting."""

import re

import pytest
import torch
from cli.helpers import USER_DIR, call, tiny_translation_data

from fairseq_adaptive.errors import UsageError

TRAINING = (
    f"--user-dir {USER_DIR} --task translation -s src -t tgt --arch shared_transformer --share-all-embeddings --dropout 0 "
    "--encoder-layers 2 --encoder-unique-layers 1 --decoder-layers 4 --decoder-unique-layers 2 --encoder-embed-dim 32 "
    "--decoder-embed-dim 32 --encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --load-alignments --criterion label_smoothed_cross_entropy_with_alignment "
    "--alignment-lambda 1 --optimizer adam --lr 5e-3 --max-tokens 600 --cpu --num-workers 0 --seed 3 "
    "--disable-validation --save-interval 100 --no-epoch-checkpoints --log-format simple --log-interval 20"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The alignments say of each word of a target that it comes from the first word of its source."""
    folder = tmp_path_factory.mktemp("data")
    tiny_translation_data(folder, n_train=400, n_words=12)
    for split in "train", "valid", "test":
        lengths = [len(line.split()) for line in (folder / f"{split}.src").read_text().splitlines()]
        lines = (" ".join(f"0-{place}" for place in range(length)) for length in lengths)
        (folder / f"{split}.align").write_text("".join(f"{line}\n" for line in lines))
    texts = [each for split in ("train", "valid", "test") for each in (f"--{split}pref", folder / split)]
    flags = "-s src -t tgt --joined-dictionary --align-suffix align".split()
    call("fairseq-preprocess", *flags, *texts, "--destdir", folder / "aligned")
    return folder / "aligned"


@pytest.mark.slow
@pytest.mark.parametrize("halting", ((), ("--halting", "act")), ids=str)
def test_alignments_are_learned_and_printed(data, halting, tmp_path, caplog):
    heads = "--alignment-layer 2 --alignment-heads 1".split()
    with caplog.at_level("INFO"):
        call("fairseq-train", data, *TRAINING, *halting, *heads, "--max-update", 60, "--save-dir", tmp_path)
    losses = [float(each) for each in re.findall(r"alignment_loss=([\d.]+)", caplog.text)]
    assert len(losses) == 3 and losses[-1] < 0.5 * losses[0]
    flags = "-s src -t tgt --cpu --num-workers 0 --beam 2 --max-tokens 400 --max-len-a 0 --max-len-b 6".split()
    path = tmp_path / "checkpoint_last.pt"
    lines = call("fairseq-generate", data, "--user-dir", USER_DIR, *flags, "--path", path, "--print-alignment")
    texts, aligned = (dict(re.findall(rf"^{mark}-(\d+)\t(.*)$", lines, re.M)) for mark in "SA")
    hypotheses = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", lines, re.M))
    assert len(hypotheses) == len(aligned) == 20
    pairs = [(number, *map(int, each.split("-"))) for number in aligned for each in aligned[number].split()]
    assert len(pairs) == sum(len(hypothesis.split()) for hypothesis in hypotheses.values())
    assert all(source < len(texts[number].split()) for number, source, _ in pairs)
    assert sum(source == 0 for _, source, _ in pairs) > 0.8 * len(pairs)


def test_heads_that_are_taught_are_those_of_the_flags(build, batch):
    """The decoder's own, where a call names none, as fairseq's generator does not; with the same weights as named ones."""
    plain = build("shared_transformer", dropout=0.0).eval()
    model = build("shared_transformer", alignment_layer=1, alignment_heads=1, dropout=0.0).eval()
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), model.parameters()))
    named = plain(**batch, alignment_layer=1, alignment_heads=1)[1]["attn"][0]
    torch.testing.assert_close(model(**batch)[1]["attn"][0], named)
    source = model.encoder(batch["src_tokens"], batch["src_lengths"])
    step = model.decoder(batch["prev_output_tokens"][:, :1], source, incremental_state={})[1]["attn"][0]
    torch.testing.assert_close(step, named[:, :1])
    last = plain(**batch)[1]["attn"][0]
    assert named.shape == last.shape and not torch.allclose(named, last)


def test_heads_that_are_not_there(build):
    with pytest.raises(UsageError, match="--alignment-layer 99 is impossible: the decoder has it up to"):
        build("shared_transformer", alignment_layer=99)
    with pytest.raises(UsageError, match="--alignment-heads 99 is impossible: the decoder has it up to"):
        build("shared_transformer", alignment_heads=99)
