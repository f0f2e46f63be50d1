"""Flags of fairseq-generate that ended with a traceback, or with hypotheses of another sentence."""

import argparse
import shutil

import pytest
import torch
from cli.helpers import call
from fairseq import utils
from fairseq.search import LexicallyConstrainedBeamSearch
from fairseq.tasks import FairseqTask
from families import FAMILIES, write_data

from fairseq_adaptive.errors import UsageError

TINY = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 2}.items()
}


class Task(FairseqTask):
    def __init__(self, dictionary):
        super().__init__(None)
        self.dictionary = dictionary

    @property
    def target_dictionary(self):
        return self.dictionary


def generator(dictionary, models, **flags):
    return Task(dictionary).build_generator(models, argparse.Namespace(max_len_b=12, **flags))


@pytest.mark.parametrize("arch", ("transformer", "shared_transformer"))
@pytest.mark.parametrize("numbers", ((128, 500, 3), (2, 0, 1)), ids=str)
@pytest.mark.parametrize("seed", range(6))  # other penalties change the hypotheses of every second model
def test_diverse_groups_of_a_sentence_do_not_depend_on_its_number(arch, numbers, seed, build, batch, dictionary):
    model = build(arch, seed=seed, **TINY)
    model.decoder.output_projection.weight.data *= 3  # random weights say much the same of all words
    net_input = {"src_tokens": batch["src_tokens"], "src_lengths": batch["src_lengths"]}
    search = generator(dictionary, [model], beam=4, diverse_beam_groups=2, diverse_beam_strength=1.0)
    together = search.generate([model], {"id": torch.tensor(numbers), "net_input": net_input})
    assert len({tuple(each["tokens"].tolist()) for each in together[0]}) > 1
    for row, found in enumerate(together):
        alone = {
            "id": torch.tensor([0]),
            "net_input": {name: value[row : row + 1] for name, value in net_input.items()},
        }
        for one, other in zip(found, search.generate([model], alone)[0]):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            assert one["score"].item() == pytest.approx(other["score"].item())


@pytest.mark.parametrize("flag", ("print_step", "retain_iter_history"))
def test_steps_of_hypotheses_that_have_none(flag, build, dictionary):
    model = build("transformer", **TINY)
    generator(dictionary, [model], **{flag: False})
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} is for iterative decoding"):
        generator(dictionary, [model], **{flag: True})


def test_constraints_that_are_not_there(dictionary):
    search = LexicallyConstrainedBeamSearch(dictionary, "ordered")
    with pytest.raises(UsageError, match="--constraints is for fairseq-interactive"):
        search.init_constraints(None, 5)


@pytest.fixture(scope="module")
def translation(tmp_path_factory):
    """A folder with raw text and the checkpoint of an untrained model, plain and shared."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    raw = folder / "raw"
    raw.mkdir()
    for side in "src", "tgt":
        shutil.copy(folder / "pairs" / f"dict.{side}.txt", raw)
        lines = (folder / "pairs" / f"train.{side}").read_text().splitlines()[:30]
        (raw / f"test.src-tgt.{side}").write_text("".join(f"{line} new{number}\n" for number, line in enumerate(lines)))
    for arch in "transformer", "shared_transformer":
        flags = FAMILIES["shared_transformer"].flags.split()
        flags[flags.index("--arch") + 1] = arch
        if arch == "transformer":
            for side in "encoder", "decoder":
                place = flags.index(f"--{side}-unique-layers")
                del flags[place : place + 2]
        call(
            "fairseq-train",
            folder / "pairs",
            *flags,
            "--cpu",
            "--num-workers",
            0,
            "--max-update",
            1,
            "--optimizer",
            "adam",
            "--disable-validation",
            "--save-dir",
            folder / arch,
        )
    return folder


@pytest.mark.parametrize("arch", ("transformer", "shared_transformer"))
@pytest.mark.parametrize("printed", ((), ("--print-alignment",), ("--print-alignment", "soft")), ids=str)
def test_unknown_words_are_replaced(arch, printed, translation, tmp_path):
    pairs = [line.split() for line in "".join(f"w{n:02d} W{n}\n" for n in range(20)).splitlines()]
    (tmp_path / "lexicon").write_text("".join(f"{word} {other}\n" for word, other in pairs))
    flags = [
        translation / "raw",
        "--dataset-impl",
        "raw",
        "--cpu",
        "--num-workers",
        0,
        "--path",
        translation / arch / "checkpoint_last.pt",
        "--batch-size",
        30,
        "--beam",
        2,
        "--max-len-b",
        6,
        "--unkpen",
        -100,
        *printed,
    ]  # a model that says <unk> and nothing else

    def hypotheses(*more):
        lines = [line.split("\t") for line in call("fairseq-generate", *flags, *more).splitlines()]
        found = {line[0][2:]: line[2].split() for line in lines if line[0].startswith("H-")}
        assert len(found) == 30 and any(line[0].startswith("A-") for line in lines) == bool(printed)
        return found

    source = (translation / "raw" / "test.src-tgt.src").read_text().splitlines()
    copied, looked_up = hypotheses("--replace-unk"), hypotheses("--replace-unk", tmp_path / "lexicon")
    assert {word for words in hypotheses().values() for word in words} == {"<unk>"}
    for number, words in copied.items():
        assert words and set(words) <= set(source[int(number)].split())
        assert looked_up[number] == [dict(pairs).get(word, word) for word in words]


def test_lexicon_of_single_words_is_refused(tmp_path):
    (tmp_path / "lexicon").write_text("one two\nthree\n")
    with pytest.raises(UsageError, match="lexicon: a line has no two words"):
        utils.load_align_dict(str(tmp_path / "lexicon"))
