"""The zoo: what is packed is what comes out, and nothing is read that is not what the manifest says."""

import functools
import http.server
import io
import json
import tarfile
import threading
import types

import pytest
import torch
from families import build_trainer, train, write_data

from fairseq_adaptive import commands, hub
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import packing, zoo
from fairseq_adaptive.hub.zoo import Entry, Zoo, read_zoo
from pages import run_python

SENTENCES = ["w01 w02 w03 w04", "w05", "w06 w07 w08 w09 w10 w11"]
SAID = {
    "name": "tiny",
    "version": "1",
    "trained_by": "fairseq-train DATA --seed 1",
    "score": {"perplexity": 12.5},
    "scored_by": "fairseq-adaptive perplexity CHECKPOINT DATA",
    "commit": "773e9f9",
    "date": "2026-11-30",
    "data": "made-up words",
    "licence": "CC0",
}
MOST = 10**7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(family)``: a file."""
    data = write_data(tmp_path_factory.mktemp("data"))
    words = [*"[PAD] [UNK] [CLS] [SEP] [MASK] good bad".split(), *(f"w{number:02d}" for number in range(20))]
    (data / "labels" / "vocab.txt").write_text("\n".join(words) + "\n")

    @functools.cache
    def checkpoint(family):
        trainer, batches = build_trainer(family, data, "--max-update", "5")
        train(trainer, batches, 2)
        path = data / f"{family}.pt"
        trainer._gathered_optim_state = None
        trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
        return path

    return checkpoint


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder that ``$FAIRSEQ_ADAPTIVE_ZOO`` names, with a cache of its own."""
    (tmp_path / "zoo").mkdir()
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "zoo"


def pack(source, place, half=False, most=MOST, **said):
    return packing.pack(source, str(place), SAID | said, {}, half, most)


def kept(place):
    """What the cache has."""
    folder = place.parent / "cache" / "zoo"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def outputs(model):
    """Numbers that a model computes of some inputs."""
    if isinstance(model, hub.Translator):
        return [each.total for each in model.score(SENTENCES, SENTENCES[::-1])]
    if isinstance(model, hub.LanguageModel):
        return [each.total for each in model.score(SENTENCES)]
    if isinstance(model, hub.ParityModel):
        return [each.probabilities for each in model.predict([[1, 0, -1, 1] * 2, [1, 0] * 4, [0] * 8])]
    return [each.probabilities for each in model.predict(["w01 good w02", "bad w03"])]


@pytest.mark.parametrize("family", ("shared_transformer_lm", "skimming_decoder", "adatape_parity", "transkimmer"))
def test_what_comes_out_computes_what_went_in(family, checkpoint, place):
    model = hub.from_pretrained(checkpoint(family), device="cpu")
    entry = pack(checkpoint(family), place)
    again = hub.from_pretrained("tiny", device="cpu")
    assert type(again) is type(model) and outputs(again) == outputs(model)
    parameters = sum(each.numel() for each in model.model.parameters())
    assert (entry.task, entry.parameters, entry.weights) == (model.origin.task, parameters, "float32")
    assert read_zoo().entries == [entry] and entry.bytes == (place / "tiny-1.tar.gz").stat().st_size
    endings = {".json", ".safetensors", ".txt"}
    assert {path.suffix for path in (place.parent / "cache").rglob("*") if path.is_file()} <= endings


def test_half_precision(checkpoint, place):
    """Half of the size, and what is computed is what the rounded weights say."""
    whole, half = (pack(checkpoint("skimming_decoder"), place, half, version=str(half + 1)) for half in (False, True))
    assert half.weights == "float16" and half.bytes < 0.65 * whole.bytes
    model = hub.from_pretrained(checkpoint("skimming_decoder"), device="cpu")
    before = outputs(model)
    for each in model.model.state_dict().values():
        each.copy_(each.half())
    assert outputs(hub.from_pretrained("tiny", device="cpu")) == outputs(model) != before
    assert outputs(model) == pytest.approx(before, abs=0.05)


def test_weights_beyond_half_precision(checkpoint, place, tmp_path):
    state = torch.load(checkpoint("shared_transformer_lm"), weights_only=False)
    name = next(name for name, each in state["model"].items() if each.is_floating_point() and each.dim() == 2)
    state["model"][name][0, 0] = 1e5
    torch.save(state, tmp_path / "large.pt")
    with pytest.raises(UsageError, match="beyond half precision"):
        pack(tmp_path / "large.pt", place, half=True)
    assert not list(place.iterdir())
    assert pack(tmp_path / "large.pt", place).weights == "float32"


def test_the_same_model_has_the_same_bytes(checkpoint, place, tmp_path):
    (tmp_path / "other").mkdir()
    first = pack(checkpoint("adatape_parity"), place)
    second = pack(checkpoint("adatape_parity"), tmp_path / "other", date="2027-01-02")
    assert first.sha256 == second.sha256
    with tarfile.open(place / first.file) as archive:
        members = archive.getmembers()
        card = json.load(archive.extractfile("tiny-1/card.json"))
    assert {(each.uid, each.gid, each.mtime, each.mode, each.uname) for each in members} == {(0, 0, 0, 0o644, "")}
    assert [each.name for each in members] == sorted(each.name for each in members)
    assert card["licence"] == "CC0" and card["score"] == {"perplexity": 12.5} and "sha256" not in card


@pytest.mark.parametrize(
    "said, told",
    (
        *(({name: " " if name != "score" else {}}, f"not complete: {name}") for name in SAID),
        ({"name": "../a"}, "name is '../a', not letters"),
        ({"version": "one"}, "version is 'one', not numbers"),
        ({"commit": "HEAD"}, "commit is 'HEAD', not 7 to 40"),
        ({"score": {"BLEU": float("nan")}}, "the score BLEU is nan: use a number"),
    ),
)
def test_an_entry_that_is_not_complete_is_refused(said, told, place):
    with pytest.raises(UsageError, match=told):
        pack("nowhere.pt", place, **said)
    assert not list(place.iterdir())


def test_what_is_larger_is_refused(checkpoint, place):
    with pytest.raises(UsageError, match=r"would have [\d,]+ bytes, more than 5,000: store half precision"):
        pack(checkpoint("adatape_parity"), place, most=5000)
    assert not list(place.iterdir())


def test_nothing_is_written_over(checkpoint, place):
    pack(checkpoint("adatape_parity"), place)
    before = {path: path.read_bytes() for path in place.iterdir()}
    for said in ({}, {"name": "tiny-1"}):
        with pytest.raises(UsageError, match="lists tiny-1 already"):
            pack(checkpoint("adatape_parity"), place, **said)
    (place / "more-1.tar.gz").write_text("mine")
    with pytest.raises(UsageError, match="more-1.tar.gz exists"):
        pack(checkpoint("adatape_parity"), place, name="more")
    (place / "more-1.tar.gz").unlink()
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def entry(**said):
    fixed = {"file": "", "bytes": 9, "sha256": 64 * "a", "task": "parity", "architecture": "a", "parameters": 1}
    made = Entry(**(SAID | fixed | {"weights": "float32"} | said))
    return Entry(**(vars(made) | {"file": f"{made.stem}.tar.gz"} | said))


def test_the_latest_version_is_found():
    versions = [entry(version=version) for version in ("1.9", "1.10", "1.2")]
    there = Zoo("zoo.json", "there", [*versions, entry(name="other")])
    assert there.find("tiny").version == "1.10" and there.find("tiny-1.9").version == "1.9"
    with pytest.raises(
        UsageError, match="no model of this name in the zoo: zoo.json has tiny, other. Names on the Hugg"
    ):
        there.find("tini")


def test_unknown_names(place, monkeypatch):
    with pytest.raises(UsageError, match="^there is no manifest .*zoo.json: .FAIRSEQ_ADAPTIVE_ZOO is to name"):
        hub.from_pretrained("tiny")
    monkeypatch.delenv("FAIRSEQ_ADAPTIVE_ZOO")
    if not read_zoo().entries:
        with pytest.raises(UsageError, match="hub/zoo.json is empty; .FAIRSEQ_ADAPTIVE_ZOO names"):
            hub.from_pretrained("tiny")


def test_the_manifest_of_the_package_is_whole(monkeypatch):
    monkeypatch.delenv("FAIRSEQ_ADAPTIVE_ZOO", raising=False)
    found = read_zoo()
    assert not found.entries or found.archives.startswith("https://")  # no archive lies in the package


@pytest.mark.parametrize("change", ("byte", "shorter", "longer", "none"))
def test_an_archive_that_is_not_what_the_manifest_says(change, checkpoint, place):
    pack(checkpoint("adatape_parity"), place)
    path = place / "tiny-1.tar.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    changed = {"byte": data, "shorter": data[:-9], "longer": data + b"a"}
    path.unlink() if change == "none" else path.write_bytes(changed[change])
    told = (
        "there is no .*tiny-1.tar.gz, which" if change == "none" else "damaged or another version: .* nothing of it was"
    )
    for _ in range(2):  # and nothing is left that a second call would take
        with pytest.raises(UsageError, match=told):
            hub.from_pretrained("tiny", device="cpu")
        assert kept(place) == []
    with pytest.raises(UsageError, match=told):
        commands.main(["zoo", "check"])


def packed_as(place, *members):
    """A zoo with an archive of members, whose checksum is right."""
    with tarfile.open(place / "tiny-1.tar.gz", "w:gz") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = (place / "tiny-1.tar.gz").read_bytes()
    listed = entry(bytes=len(data), sha256=zoo.hashlib.sha256(data).hexdigest())
    (place / "zoo.json").write_text(json.dumps(zoo.as_manifest([listed])))


def member(name, kind=tarfile.REGTYPE, target=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "given",
    (
        member("tiny-1/../../escaped"),
        member("../escaped"),
        member("/tmp/escaped"),
        member("escaped"),
        member("tiny-1/a", tarfile.SYMTYPE, "/etc/passwd"),
        member("tiny-1/a", tarfile.LNKTYPE, "tiny-1/config.json"),
        member("tiny-1/a", tarfile.FIFOTYPE),
        member("tiny-1", tarfile.DIRTYPE),
    ),
    ids=lambda each: f"{each.name}-{each.type.decode()}",
)
def test_archives_hold_plain_files_in_their_folder(given, place):
    packed_as(place, (member("tiny-1/config.json"), b"{}"), (given, b""))
    with pytest.raises(UsageError, match="which no archive of the zoo does"):
        hub.from_pretrained("tiny")
    assert kept(place) == [] and not list(place.parent.rglob("escaped"))


def test_an_archive_that_unpacks_without_end(place, monkeypatch):
    monkeypatch.setattr(zoo, "UNPACKED", 1000)
    packed_as(place, (member("tiny-1/a"), bytes(1001)))
    with pytest.raises(UsageError, match="holds 'tiny-1/a'"):
        hub.from_pretrained("tiny")


def test_what_is_no_archive(place):
    packed_as(place, (member("tiny-1/a"), b"a"))
    (place / "tiny-1.tar.gz").write_bytes(b"nothing")
    listed = entry(bytes=7, sha256=zoo.hashlib.sha256(b"nothing").hexdigest())
    (place / "zoo.json").write_text(json.dumps(zoo.as_manifest([listed])))
    with pytest.raises(UsageError, match="is no archive of the zoo"):
        hub.from_pretrained("tiny")


def change(content, **changed):
    return content | {"models": [content["models"][0] | changed]}


@pytest.mark.parametrize(
    "made, told",
    (
        (lambda content: content | {"format": 2}, "has the format 2, and this version reads 1"),
        (lambda content: content | {"models": {}}, "models a list"),
        (lambda content: content | {"models": ["tiny"]}, "'tiny' is no entry"),
        (lambda content: content | {"models": 2 * content["models"]}, "two entries of one name"),
        (lambda content: change(content, file="../../tiny-1.tar.gz"), "file is .*, not tiny-1.tar.gz"),
        (lambda content: change(content, name="../tiny"), "name is '../tiny', not"),
        (lambda content: change(content, sha256="A" * 64), "sha256 is"),
        (lambda content: change(content, bytes=0), "bytes is 0: use a whole number"),
        (lambda content: change(content, bytes=True), "not complete: bytes is True"),
        (lambda content: change(content, score={"BLEU": "high"}), "the score BLEU is 'high': use a number"),
        (
            lambda content: content | {"models": [{k: v for k, v in content["models"][0].items() if k != "licence"}]},
            "lacks licence",
        ),
    ),
)
def test_a_manifest_that_is_damaged(made, told, place):
    (place / "zoo.json").write_text(json.dumps(made(zoo.as_manifest([entry()]))))
    with pytest.raises(UsageError, match=told) as caught:
        read_zoo()
    assert "\n" not in str(caught.value)


def test_several_processes_at_once(checkpoint, place, monkeypatch):
    """All fetch before one of them has its folder in place; one folder is left, whole."""
    pack(checkpoint("adatape_parity"), place)
    stock, together = zoo.unpack, threading.Barrier(3)

    def unpack(*args):
        stock(*args)
        together.wait(timeout=60)

    monkeypatch.setattr(zoo, "unpack", unpack)
    found = []
    threads = [threading.Thread(target=lambda: found.append(zoo.local_model("tiny"))) for _ in range(3)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert len(found) == 3 and len(set(found)) == 1 and len(kept(place)) == 1
    outputs(hub.from_pretrained("tiny", device="cpu"))


@pytest.fixture
def served(place):
    """The folder behind an address; with the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(place))

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield types.SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}", asked=asked, stop=server.shutdown)
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address(checkpoint, place, served, monkeypatch):
    """The archive is fetched once; what is too long or is not there is told."""
    pack(checkpoint("adatape_parity"), place)
    model = hub.from_pretrained(checkpoint("adatape_parity"), device="cpu")
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_ZOO", served.address + "/")
    for _ in range(2):
        assert outputs(hub.from_pretrained("tiny", device="cpu")) == outputs(model)
    assert served.asked.count("/tiny-1.tar.gz") == 1 and served.asked.count("/zoo.json") == 2
    content = json.loads((place / "zoo.json").read_text())
    (place / "zoo.json").write_text(json.dumps(content | {"archives": f"{served.address}/v1"}))
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_CACHE", str(place.parent / "other"))
    with pytest.raises(UsageError, match=r"^cannot fetch http://.*/v1/tiny-1.tar.gz: .*; without network, "):
        hub.from_pretrained("tiny")
    (place / "zoo.json").write_text(json.dumps(content))
    (place / "tiny-1.tar.gz").write_bytes((place / "tiny-1.tar.gz").read_bytes() + bytes(10**6))
    with pytest.raises(UsageError, match=f"it has {content['models'][0]['bytes'] + 1} bytes"):  # and no more was read
        hub.from_pretrained("tiny")
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_ZOO", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="^cannot fetch http://127.0.0.1:9/zoo.json: .*refused"):
        hub.from_pretrained("tiny")


def test_the_commands(checkpoint, place, capsys):
    words = [
        "zoo",
        "pack",
        str(checkpoint("adatape_parity")),
        "--zoo",
        str(place),
        "--name",
        "parity-8",
        "--version",
        "1",
    ]
    words += ["--trained-by", "fairseq-train", "--score", "accuracy=51.5", "loss=2", "--scored-by", "fairseq-validate"]
    words += ["--commit", "773e9f9", "--data", "made when it is read", "--licence", "none", "--half"]
    commands.main(words)
    assert "parity-8-1.tar.gz: " in capsys.readouterr().out
    commands.main(["zoo", "list"])
    (line,) = capsys.readouterr().out.splitlines()
    for each in ("parity-8-1  0.0", "  adatape_parity  ", "float16", "accuracy 51.5, loss 2", "(none)"):
        assert each in line
    commands.main(["zoo", "list", "parity-8"])
    (said,) = json.loads(capsys.readouterr().out)
    assert said["trained_by"] == "fairseq-train" and said["date"][:2] == "20"
    commands.main(["zoo", "check", "--zoo", str(place)])
    assert capsys.readouterr().out.splitlines()[-1].endswith("zoo.json: 1 models")
    with pytest.raises(SystemExit):
        commands.main([*words[:-1], "--most", "0"])
    with pytest.raises(SystemExit):
        commands.main([word.replace("accuracy=51.5", "accuracy") for word in words])
    assert "is no score: say METRIC=NUMBER" in capsys.readouterr().err


def test_the_page(checkpoint, place):
    pack(checkpoint("shared_transformer_lm"), place, name="tiny-lm")
    found = run_python("docs/zoo.md", "tiny-lm")
    assert isinstance(found["model"], hub.LanguageModel)
