"""Averaging and exporting a trained model with the commands, and translating with what comes out."""

import math
from pathlib import Path

import pytest
from cli.helpers import USER_DIR, run, tiny_translation_data

SCRIPTS = Path(USER_DIR).parent / "scripts"
WIDTHS = [
    flag
    for side in ("encoder", "decoder")
    for flag in (f"--{side}-embed-dim", 64, f"--{side}-ffn-embed-dim", 256, f"--{side}-attention-heads", 4)
]
TRAIN = [
    "--task",
    "translation",
    "--share-all-embeddings",
    "--dropout",
    0.1,
    "--optimizer",
    "adam",
    "--lr",
    0.003,
    "--lr-scheduler",
    "inverse_sqrt",
    "--warmup-updates",
    50,
    "--max-tokens",
    600,
    "--seed",
    1,
    "--cpu",
    "--criterion",
    "label_smoothed_cross_entropy",
    "--label-smoothing",
    0.1,
    "--num-workers",
    0,
    "--disable-validation",
]


def layers(depths, unique):
    sides = ("encoder", "decoder")
    return [flag for side in sides for flag in (f"--{side}-layers", depths, f"--{side}-unique-layers", unique)]


def translate(data, checkpoint, *flags):
    """{sentence: (score in bits a token, words)}; at a multiple of 8, its default, fairseq drops the last batch."""
    done = run(
        "fairseq-generate",
        data,
        "--path",
        checkpoint,
        "--beam",
        4,
        "--cpu",
        "--num-workers",
        0,
        "--required-batch-size-multiple",
        1,
        *flags,
    )
    rows = [line[2:].split("\t") for line in done.stdout.splitlines() if line.startswith("H-")]
    return {int(number): (float(score), words) for number, score, words in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """2 layers at 4 depths after 200 updates, the mean of checkpoints 180, 190 and 200, and its plain counterpart."""
    folder = tmp_path_factory.mktemp("export")
    data = tiny_translation_data(folder / "data", n_train=2000, n_words=12, max_length=4)
    run(
        "fairseq-train",
        data,
        "--user-dir",
        USER_DIR,
        "--arch",
        "shared_transformer",
        *layers(4, 2),
        *WIDTHS,
        *TRAIN,
        "--max-update",
        200,
        "--save-interval-updates",
        10,
        "--keep-interval-updates",
        3,
        "--no-epoch-checkpoints",
        "--save-dir",
        folder / "shared",
    )
    average = folder / "average.pt"
    run(
        "python",
        SCRIPTS / "average_checkpoints.py",
        "--inputs",
        folder / "shared",
        "--num-update-checkpoints",
        3,
        "--output",
        average,
    )
    run("python", SCRIPTS / "export_checkpoint.py", average, "--to", "fairseq", "--output", folder / "plain.pt")
    return folder


@pytest.fixture(scope="module")
def translations(folder):
    found = translate(folder / "data" / "bin", folder / "average.pt", "--user-dir", USER_DIR)
    assert sorted(found) == list(range(20))
    references = (folder / "data" / "test.tgt").read_text().splitlines()
    right = sum(words == references[number] for number, (_, words) in found.items())
    assert right > 10, f"the model has learnt too little for beam search to be of one mind: {right} of 20 are right"
    return found


def test_plain_fairseq_without_plug_in_translates_the_same(folder, translations):
    plain = translate(folder / "data" / "bin", folder / "plain.pt")
    assert {number: words for number, (_, words) in plain.items()} == {
        number: words for number, (_, words) in translations.items()
    }
    for number, (score, _) in plain.items():
        assert score == pytest.approx(translations[number][0], abs=1e-4)


def test_ctranslate2_translates_the_same(folder, translations):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (extra export)")
    run(
        "python",
        SCRIPTS / "export_checkpoint.py",
        folder / "average.pt",
        "--to",
        "ctranslate2",
        "--data-dir",
        folder / "data" / "bin",
        "--output",
        folder / "ct2",
    )
    translator = ctranslate2.Translator(str(folder / "ct2"), intra_threads=1)
    sources = [line.split() for line in (folder / "data" / "test.src").read_text().splitlines()]
    # at its minimum of 1, CTranslate2 shares out the probability of an empty translation, which fairseq does not
    results = translator.translate_batch(
        sources, beam_size=4, max_decoding_length=200, min_decoding_length=0, return_scores=True
    )
    for number, result in enumerate(results):
        score, words = translations[number]
        assert " ".join(result.hypotheses[0]) == words
        assert result.scores[0] / math.log(2) == pytest.approx(score, abs=1e-4)
    # the weights, once, and the table of 1,026 positions, which fairseq computes
    weights = (folder / "plain.pt").stat().st_size + 1026 * 64 * 4
    assert (folder / "ct2" / "model.bin").stat().st_size < 1.02 * weights


def test_checkpoints_store_the_unique_layers(folder):
    """The file of 2 layers at 4 depths is as large as that of 2 layers at 2 depths; optimizer states included."""
    run(
        "fairseq-train",
        folder / "data" / "bin",
        "--user-dir",
        USER_DIR,
        "--arch",
        "shared_transformer",
        *layers(2, 2),
        *WIDTHS,
        *TRAIN,
        "--max-update",
        1,
        "--no-epoch-checkpoints",
        "--save-dir",
        folder / "shallow",
    )
    deep, shallow = ((folder / name / "checkpoint_last.pt").stat().st_size for name in ("shared", "shallow"))
    layer = 2 * 64 * 256 + 4 * 64 * 64  # weights of an encoder layer; a decoder layer has 4 * 64 * 64 more
    assert shallow > 3 * 4 * 2 * (2 * layer + 4 * 64 * 64)
    assert deep == pytest.approx(shallow, rel=0.01)
    # averaged and exported: no optimizer state, and no layer twice
    assert (folder / "average.pt").stat().st_size < 0.36 * deep
    assert (folder / "plain.pt").stat().st_size < 1.05 * (folder / "average.pt").stat().st_size


def test_error_is_one_line_and_leaves_the_file_alone(folder):
    before = (folder / "plain.pt").read_bytes()
    done = run(
        "python",
        SCRIPTS / "export_checkpoint.py",
        folder / "average.pt",
        "--to",
        "fairseq",
        "--output",
        folder / "plain.pt",
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if "tensorboardX" not in line]
    message = f"error: {folder / 'plain.pt'} exists and is left as it is: name another output, or remove it first"
    assert done.returncode == 1 and lines == [message]
    assert (folder / "plain.pt").read_bytes() == before
