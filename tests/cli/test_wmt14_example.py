"""examples/translation for WMT14, on tiny archives of the official layout: prepare, train, evaluate, hydra configs."""

import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from cli.helpers import run
from cli.wmt14 import EXAMPLE, PAIRS, ROOT, SENTENCES, TESTSETS, bash, sentences, sha256, tiny_archives

TINY = {"layers": 2, "embed-dim": 16, "ffn-embed-dim": 32, "attention-heads": 2}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    tiny_archives(folder)
    return folder


@pytest.fixture(scope="module")
def checksums(archives, tmp_path_factory):
    file = tmp_path_factory.mktemp("checksums") / "SHA256SUMS"
    file.write_text("".join(f"{sha256(path)}  {path.name}\n" for path in sorted(archives.iterdir())))
    return file


@pytest.fixture(scope="module")
def data(archives, tmp_path_factory):
    """Prepared by a copy of the script whose published checksums are those of the tiny archives."""
    folder = tmp_path_factory.mktemp("wmt14")
    script = (EXAMPLE / "prepare-wmt14en2de.sh").read_text()
    for path in archives.iterdir():
        script, replaced = re.subn(rf"\b\w+  {path.name}\b", f"{sha256(path)}  {path.name}", script)
        assert replaced == 1
    copy = folder / "translation" / "prepare.sh"
    copy.parent.mkdir()
    copy.write_text(script)
    for name in ("common.sh", "download.sh", "subwords.sh"):
        shutil.copy(EXAMPLE.parent / name, folder)
    bash(copy, archives, "out", "--merges", "100", "--workers", "2", cwd=folder)
    return folder / "out"


def lines(path):
    return path.read_text().split("\n")[:-1]


def test_pairs_stay_parallel(data):
    english, german = (
        [line.replace("@@ ", "") for line in lines(data / f"train.clean.{lang}")] for lang in ("en", "de")
    )
    numbers = [re.findall(r"\d+ ", line)[0] for line in english]
    assert numbers == [re.findall(r"\d+ ", line)[0] for line in german]
    assert len(numbers) == len(set(numbers)) == 3 * PAIRS - 2
    assert f"{PAIRS + 20} " not in numbers and f"{PAIRS + 21} " not in numbers
    assert english[PAIRS + 10].endswith(". from a Mac")
    assert "getrennt und mehr" in german[PAIRS + 11]


def test_test_sets(data):
    for name in TESTSETS:
        first = SENTENCES * int(name[-4:])
        for lang in ("en", "de"):
            assert lines(data / f"{name}.{lang}") == sentences(lang, first, SENTENCES)
            assert [line.replace("@@ ", "").split()[1] for line in lines(data / f"{name}.bpe.{lang}")] == [
                str(number) for number in range(first, first + SENTENCES)
            ]
    table = [line.split() for line in lines(data / "testsets")]
    assert [row[1] for row in table if row[0] in ("test", "valid")] == ["newstest2014", "newstest2013"]
    assert sorted(row[1] for row in table) == sorted(TESTSETS)
    for subset, name, standard in table:
        assert (data / "bin" / f"{subset}.en-de.de.bin").exists()
    assert (data / "bin" / "dict.en.txt").read_text() == (data / "bin" / "dict.de.txt").read_text()


def test_prepared_data_is_not_overwritten(data, archives):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    done = bash(EXAMPLE / "prepare-wmt14en2de.sh", archives, data, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "exists already" in done.stderr
    (data.parent / "begun").mkdir()
    shutil.copy(data / "options", data.parent / "begun")
    done = bash(EXAMPLE / "prepare-wmt14en2de.sh", archives, data.parent / "begun", check=False)
    assert done.returncode == 1 and "was begun with bpe=subword-nmt merges=100" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


@pytest.mark.slow
def test_sentencepiece(archives, checksums, tmp_path):
    bash(
        EXAMPLE / "prepare-wmt14en2de.sh",
        archives,
        tmp_path / "out",
        "--bpe",
        "sentencepiece",
        "--merges",
        "90",
        "--checksums",
        checksums,
    )
    pieces = lines(tmp_path / "out" / "newstest2014.bpe.de")
    text = [line.replace(" ", "").replace("▁", " ").strip() for line in pieces]
    assert text == sentences("de", SENTENCES * 2014, SENTENCES)
    assert {line.split()[2] for line in lines(tmp_path / "out" / "testsets")} == {"-"}


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.folder`` with byte ranges; sends at most ``server.limit`` bytes of what it announced."""

    def do_GET(self):
        file = self.server.folder / self.path.lstrip("/")
        if not file.exists():
            return self.send_error(404)
        start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        body = file.read_bytes()[start:]
        self.server.starts.append((file.name, start))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(archives):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.limit, server.starts = archives, None, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_interrupted_download_goes_on(archives, checksums, mirror, tmp_path):
    raw, folder = tmp_path / "raw", tmp_path / "mirror"
    folder.mkdir()
    shutil.copy(archives / "europarl-v7.tgz", folder)  # the next archive is not found, which ends the second run
    mirror.folder, mirror.limit = folder, 300
    command = [
        EXAMPLE / "prepare-wmt14en2de.sh",
        raw,
        tmp_path / "out",
        "--mirror",
        mirror.url,
        "--checksums",
        checksums,
    ]
    done = bash(*command, check=False)
    assert done.returncode == 1 and "run this again to go on" in done.stderr
    assert [path.name for path in raw.iterdir()] == ["europarl-v7.tgz.part"]
    assert (raw / "europarl-v7.tgz.part").stat().st_size == 300
    mirror.limit = None
    done = bash(*command, check=False)
    assert done.returncode == 1 and "commoncrawl.tgz" in done.stderr
    assert mirror.starts == [("europarl-v7.tgz", 0), ("europarl-v7.tgz", 300)]
    assert [path.name for path in raw.iterdir()] == ["europarl-v7.tgz"]
    assert (raw / "europarl-v7.tgz").read_bytes() == (archives / "europarl-v7.tgz").read_bytes()
    assert not list((tmp_path / "out").iterdir())


def test_damaged_archives_are_refused(archives, checksums, mirror, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(archives, raw)
    damaged = bytearray((raw / "nc-v11.tgz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (raw / "nc-v11.tgz").write_bytes(damaged)
    command = [
        EXAMPLE / "prepare-wmt14en2de.sh",
        raw,
        tmp_path / "out",
        "--mirror",
        mirror.url,
        "--checksums",
        checksums,
    ]
    done = bash(*command, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nc-v11.tgz is damaged" in done.stderr
    assert (raw / "nc-v11.tgz").read_bytes() == damaged and mirror.starts == []

    (raw / "nc-v11.tgz").rename(raw / "nc-v11.tgz.part")
    with open(raw / "nc-v11.tgz.part", "r+b") as part:
        part.truncate(len(damaged) - 100)
    mirror.folder = tmp_path / "mirror"
    mirror.folder.mkdir()
    (mirror.folder / "nc-v11.tgz").write_bytes(damaged)
    done = bash(*command, check=False)
    assert done.returncode == 1 and "nc-v11.tgz is damaged" in done.stderr
    assert mirror.starts == [("nc-v11.tgz", len(damaged) - 100)]
    assert not (raw / "nc-v11.tgz").exists() and (raw / "nc-v11.tgz.damaged").read_bytes() == damaged
    assert not (tmp_path / "out" / "bin").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bpe", "wordpiece"], "--bpe is subword-nmt or sentencepiece, not 'wordpiece'"),
        (["--merges", "0"], "take a positive number, not '0'"),
        (["--max-ratio", "x"], "--max-ratio takes a number, not 'x'"),
        (["--checksums", "/no/such/file"], "cannot read the checksums in /no/such/file"),
        (["--unknown", "1"], "usage: bash prepare-wmt14en2de.sh RAW OUT"),
    ],
)
def test_wrong_arguments(tmp_path, flags, message):
    done = bash(EXAMPLE / "prepare-wmt14en2de.sh", tmp_path / "raw", tmp_path / "out", *flags, check=False)
    assert done.returncode != 0 and message in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["prepare-wmt14en2de.sh", "train-wmt14.sh", "train-wmt14-native.sh", "evaluate.sh"])
def test_usage(script):
    done = bash(EXAMPLE / script, check=False)
    assert done.returncode == 2 and f"usage: bash {script}" in done.stderr and "set -euo" not in done.stderr


@pytest.mark.parametrize("gpus, update_freq", [(0, 128), (1, 128), (3, 43), (4, 32), (8, 16)])
def test_batch_is_that_of_the_paper_and_counterparts_differ_in_the_model_only(tmp_path, gpus, update_freq):
    for name, text in ("python3", f"echo {gpus}"), ("fairseq-train", 'printf "%s\\n" "$@"'):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "train.en-de.en.bin").touch()
    native = bash(EXAMPLE / "train-wmt14-native.sh", tmp_path, "ck", path=[tmp_path]).stdout.split("\n")
    shared = bash(
        EXAMPLE / "train-wmt14.sh",
        tmp_path,
        "ck",
        "shared_transformer_wmt_en_de",
        "--layer-sharing",
        "cycle",
        path=[tmp_path],
    ).stdout.split("\n")
    assert native[native.index("--update-freq") + 1] == str(update_freq)
    assert ("--fp16" in native) == (gpus > 0) and "--user-dir" not in native
    added = shared[len(native) - 1 : -1]
    assert shared[: len(native) - 1] == native[:-1] and added[0] == "--user-dir"
    assert added[2:] == ["--arch", "shared_transformer_wmt_en_de", "--init", "admin", "--layer-sharing", "cycle"]


def test_train_and_evaluate(data, tmp_path):
    tiny = [f"--{side}-{name}={value}" for name, value in TINY.items() for side in ("encoder", "decoder")]
    done = bash(
        EXAMPLE / "train-wmt14.sh",
        data,
        tmp_path / "ck",
        "shared_transformer_wmt_en_de",
        "--layer-sharing",
        "cycle_rev",
        "--encoder-unique-layers",
        1,
        "--decoder-unique-layers",
        1,
        *tiny,
        "--cpu",
        "--update-freq",
        1,
        "--max-epoch",
        2,
        cwd=tmp_path,
    )
    assert "3584 tokens x 1 x 128" in done.stderr
    assert {"checkpoint1.pt", "checkpoint2.pt"} <= {path.name for path in (tmp_path / "ck").iterdir()}
    done = bash(
        EXAMPLE / "evaluate.sh",
        data,
        tmp_path / "ck",
        tmp_path / "scores",
        "--last",
        2,
        "--cpu",
        "--max-len-b",
        20,
        cwd=tmp_path,
    )
    signature, compounds = done.stdout.splitlines()
    assert re.match(r"newstest2014 sacreBLEU against wmt14/full: BLEU\|\S*tok:13a\S* = \d+\.\d+ ", signature)
    assert re.match(r"newstest2014 tokenised, compounds split: BLEU4 = \d+\.\d+", compounds)
    assert len(lines(tmp_path / "scores" / "newstest2014.de")) == SENTENCES
    assert all("Haus ##AT##-##AT## Hund" in line for line in lines(tmp_path / "scores" / "newstest2014.ref"))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--testset", "newstest1999"], "no test set 'newstest1999' in"),
        (["--reference", "/no/such/file"], "the reference /no/such/file is missing"),
        (["--bpe", "wordpiece"], "--bpe is subword-nmt or sentencepiece, not 'wordpiece'"),
    ],
)
def test_evaluate_refuses(data, tmp_path, args, message):
    done = bash(EXAMPLE / "evaluate.sh", data, tmp_path, tmp_path / "scores", *args, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    "config, arch",
    [
        ("wmt14_en_de_shared", "shared_transformer_wmt_en_de"),
        pytest.param("wmt14_en_de_native", "transformer_wmt_en_de", marks=pytest.mark.slow),
    ],
)
def test_hydra_config(data, tmp_path, config, arch):
    tiny = [
        f"+model.{side}_{name.replace('-', '_')}={value}"
        for name, value in TINY.items()
        for side in ("encoder", "decoder")
    ]
    run(
        "fairseq-hydra-train",
        "--config-dir",
        EXAMPLE / "config",
        "--config-name",
        config,
        f"task.data={data / 'bin'}",
        f"checkpoint.save_dir={tmp_path / 'ck'}",
        f"hydra.run.dir={tmp_path / 'run'}",
        *tiny,
        "common.cpu=true",
        "common.fp16=false",
        "distributed_training.distributed_world_size=1",
        "optimization.update_freq=[1]",
        "optimization.max_update=2",
        "dataset.max_tokens=1000",
        cwd=ROOT,
    )
    checkpoint = torch.load(tmp_path / "ck" / "checkpoint_last.pt", weights_only=True)
    model = checkpoint["cfg"]["model"]
    assert model["_name"] == arch and model["share_all_embeddings"] and model["dropout"] == 0.3
    assert checkpoint["optimizer_history"][-1]["num_updates"] == 2
