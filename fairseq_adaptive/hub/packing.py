"""Archives of the zoo: a trained model as one small file with the same bytes each time, and its entry in the manifest."""

import gzip
import hashlib
import json
import os
import tarfile
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Dict, Iterator

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fairseq_adaptive import hub
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import whole_file
from fairseq_adaptive.hub.folder import write_folder
from fairseq_adaptive.hub.zoo import CARD, MANIFEST, Entry, Zoo, as_manifest, check_archive, fetch, read_zoo, unpack

LATER = ("bytes", "sha256", "date")  # what a card lacks: known of the finished file, or other in every packing


def pack(source, place, said: Dict[str, Any], options: Dict[str, Any], half: bool, most: int) -> Entry:
    """Write an archive and its entry to a folder.

    Args:
        source: of ``hub.from_pretrained``
        place: folder of archives and manifest; an empty one becomes a zoo
        said: the fields of the entry that nobody can read off the model
        options: of ``hub.from_pretrained``, such as ``codes``
        half: store float16, to which weights are rounded
        most: bytes of the archive

    Returns:
        the entry

    Raises:
        UsageError: where the entry is not complete or there already, the archive is larger than ``most``, weights are beyond
            half precision, or what was written does not load as what was packed
    """
    if not os.path.isdir(place):
        raise UsageError(f"there is no folder {place} for the archive and {MANIFEST}")
    unknown = {"bytes": 1, "sha256": 64 * "0", "task": "?", "architecture": "?", "parameters": 1}
    stem = f"{said['name']}-{said['version']}"
    entry = Entry(**said, **unknown, file=f"{stem}.tar.gz", weights="float16" if half else "float32").check("zoo pack")
    path = os.path.join(place, entry.file)
    _require_unlisted(place, entry)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists and is left as it is: give another version")
    model = hub.from_pretrained(source, device="cpu", **options)
    if model.origin is None:
        raise UsageError(f"{source} is a model that save_pretrained does not write: it cannot be packed")
    if half:
        _round(model.model, source)
    entry = replace(
        entry,
        task=model.origin.task,
        architecture=model.origin.architecture,
        parameters=sum(each.numel() for each in model.model.parameters()),
    )
    with tempfile.TemporaryDirectory() as scratch, whole_file(path) as part:
        folder = os.path.join(scratch, entry.stem)
        write_folder(folder, model.origin, model.model, model.task, half)
        with open(os.path.join(folder, CARD), "w", encoding="utf-8") as file:
            card = {name: value for name, value in asdict(entry).items() if name not in LATER}
            json.dump(card, file, indent=1, ensure_ascii=False)
        write_archive(folder, part)
        size = os.path.getsize(part)
        if size > most:
            raise UsageError(
                f"{entry.file} would have {size:,} bytes, more than {most:,}: "
                f"{'train a smaller model' if half else 'store half precision, or train a smaller model'}"
            )
        with open(part, "rb") as file:
            entry = replace(entry, bytes=size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
        entry.check(part)
        _verify(part, entry, model)
    with _locked(place):  # behind the archive: no reader finds an entry without one
        zoo = _listed(place)
        _write_manifest(place, as_manifest([*zoo.entries, entry], zoo.archives))
    return entry


def write_archive(folder, path) -> None:
    """A ``tar.gz`` of a folder's files in the order of their names, without times, owners and modes of this machine."""
    top = os.path.basename(folder)
    files = sorted(
        os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names
    )
    with (
        open(path, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=9, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in files:
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size, member.mode = os.path.getsize(os.path.join(folder, name)), 0o644
            with open(os.path.join(folder, name), "rb") as file:
                archive.addfile(member, file)


def check_all(zoo: Zoo) -> Iterator[Entry]:
    """Fetch, check, unpack and load every model of a zoo; give each entry that is what the manifest says.

    Raises:
        UsageError: for the first that is not
    """
    for entry in zoo.entries:
        with tempfile.TemporaryDirectory() as scratch:
            archive = os.path.join(scratch, entry.file)
            fetch(zoo, entry, archive)
            model = _loaded(archive, entry, os.path.join(scratch, "model"))
            found = sum(each.numel() for each in model.model.parameters())
            if found != entry.parameters and type(model).__name__ != "Encoder":
                raise UsageError(f"{entry.file} has {found} parameters, and the manifest says {entry.parameters}")
        yield entry


def _loaded(archive, entry, folder):
    os.mkdir(folder)
    unpack(archive, entry, folder)
    return hub.from_pretrained(folder, device="cpu")


@torch.no_grad()
def _round(model, source):
    for name, each in model.state_dict().items():
        if each.is_floating_point():
            rounded = each.half().to(each.dtype)
            if not rounded.isfinite().all() and each.isfinite().all():
                raise UsageError(f"{name} of {source} is beyond half precision: pack it without --half")
            each.copy_(rounded)


def _verify(archive, entry, model):
    """What comes out of an archive has the weights that went in; the flags and the words are those that were read."""
    check_archive(archive, entry, archive)
    with tempfile.TemporaryDirectory() as scratch:
        again = _loaded(archive, entry, os.path.join(scratch, "model"))
        here, there = model.model.state_dict(), again.model.state_dict()
        if here.keys() != there.keys() or not all(torch.equal(here[name], there[name]) for name in here):
            raise UsageError(f"{entry.file} does not load as what was packed: it is not written")


def _listed(place) -> Zoo:
    if not os.path.exists(os.path.join(place, MANIFEST)):
        return Zoo(MANIFEST, None, [])
    zoo = read_zoo(place)
    return replace(zoo, archives=None) if zoo.archives == os.path.abspath(place) else zoo


def _require_unlisted(place, entry):
    for each in _listed(place).entries:
        if entry.stem in (each.stem, each.name) or entry.name == each.stem:
            raise UsageError(f"{os.path.join(place, MANIFEST)} lists {each.stem} already: give another version or name")


@contextmanager
def _locked(folder) -> Iterator[None]:
    """Nobody else changes the manifest meanwhile."""
    held = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _write_manifest(place, content):
    with tempfile.TemporaryDirectory(prefix=".part.", dir=place) as scratch:
        part = os.path.join(scratch, MANIFEST)
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.replace(part, os.path.join(place, MANIFEST))
