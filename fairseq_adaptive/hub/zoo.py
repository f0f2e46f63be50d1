"""The zoo: small trained models by name.

A zoo is a folder or an address with a manifest, ``zoo.json``, and the archives that it lists. Which one is asked is said by
``$FAIRSEQ_ADAPTIVE_ZOO``; without it, by the manifest that the package carries. An archive is read once its size and
SHA-256 are those of the manifest. What is unpacked is kept in the user's cache.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, fields
from typing import Any, Dict, Iterator, List

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, whole_folder
from fairseq_adaptive.ops.native import cache
from fairseq_adaptive.ranges import NUMBER, Range

MANIFEST, FORMAT, PLACE = "zoo.json", 1, "FAIRSEQ_ADAPTIVE_ZOO"
CARD = "card.json"  # in an archive: its entry, but for what is only known of the finished file
BYTES, PARAMETERS = Range(int, 1, 10**9), Range(int, 1, 10**9)
UNPACKED = 10**9  # bytes that an archive may hold
_MANIFEST_BYTES, _PATIENCE = 1 << 24, 30
_NAME, _VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"), re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}")
_ADDRESS = re.compile(r"(https?|file)://")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a model.

    Attributes:
        name, version: such as ``tiny-lm`` and ``1.2``
        file: ``NAME-VERSION.tar.gz``
        bytes, sha256: of the file
        task, architecture, parameters: of the model
        weights: ``float32`` or ``float16``, as they are stored
        trained_by: the command
        score: numbers by metric
        scored_by: the command that measured them
        commit: of the code that trained it
        date: of the packing
        data, licence: what it was trained on, and what may be done with that
    """

    name: str
    version: str
    file: str
    bytes: int
    sha256: str
    task: str
    architecture: str
    parameters: int
    weights: str
    trained_by: str
    score: Dict[str, float]
    scored_by: str
    commit: str
    date: str
    data: str
    licence: str

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.version}"

    def check(self, where) -> "Entry":
        """Return this entry.

        Args:
            where: it stands, for the message

        Raises:
            UsageError: for the first field that is empty, or no such thing
        """
        said = f"{where}: the entry {self.name!r:.40}"
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type if isinstance(field.type, type) else dict
            if not isinstance(value, kind) or isinstance(value, bool) or not str(value).strip() or value == {}:
                raise UsageError(f"{said} is not complete: {field.name} is {value!r:.40}")
        patterns = {
            "name": (_NAME, "letters, digits, - and _"),
            "version": (_VERSION, "numbers with dots between them"),
            "sha256": (re.compile("[0-9a-f]{64}"), "64 hexadecimal digits"),
            "commit": (re.compile("[0-9a-f]{7,40}"), "7 to 40 hexadecimal digits"),
            "date": (re.compile(r"\d{4}-\d\d-\d\d"), "YEAR-MONTH-DAY"),
            "weights": (re.compile("float(16|32)"), "float16 or float32"),
            "file": (re.compile(re.escape(f"{self.stem}.tar.gz")), f"{self.stem}.tar.gz"),
        }
        for name, (pattern, wanted) in patterns.items():
            if not pattern.fullmatch(getattr(self, name)):
                raise UsageError(f"{said}: {name} is {getattr(self, name)!r:.80}, not {wanted}")
        for metric, value in self.score.items():
            NUMBER.check(value, f"{said}: the score {metric!s:.40}")
        BYTES.check(self.bytes, f"{said}: bytes")
        PARAMETERS.check(self.parameters, f"{said}: parameters")
        return self


@dataclass(frozen=True)
class Zoo:
    """What there is, and where.

    Attributes:
        manifest: its file or address
        archives: the folder or address that they lie in
        entries: of the manifest, in its order
    """

    manifest: str
    archives: str
    entries: List[Entry]

    def find(self, name: str) -> Entry:
        """The entry of ``NAME``, the latest version of it, or of ``NAME-VERSION``.

        Raises:
            UsageError: where there is none; it lists what there is
        """
        found = [each for each in self.entries if each.name == name] or [
            each for each in self.entries if each.stem == name
        ]
        if not found:
            names = ", ".join(dict.fromkeys(each.name for each in self.entries))
            there = f"has {names}" if names else f"is empty; ${PLACE} names the folder or the address of another one"
            raise UsageError(
                f"there is no file or folder {name}, and no model of this name in the zoo: {self.manifest} {there}. "
                "Names on the Hugging Face hub are OWNER/NAME"
            )
        return max(found, key=lambda each: [int(part) for part in each.version.split(".")])


def is_name(source) -> bool:
    """Whether a text can be a name of the zoo: neither a path nor a name on the Hugging Face hub."""
    name = os.fspath(source)
    return bool(_NAME.fullmatch(name)) or bool(re.fullmatch(rf"{_NAME.pattern}-{_VERSION.pattern}", name))


def read_zoo(place=None) -> Zoo:
    """The zoo of a folder or an address.

    Args:
        place: (default: ``$FAIRSEQ_ADAPTIVE_ZOO``, else that of the package)

    Raises:
        UsageError: where there is no manifest, it cannot be fetched or is damaged, by name
    """
    place = os.fspath(place or os.environ.get(PLACE) or os.path.dirname(os.path.abspath(__file__)))
    place = place if _ADDRESS.match(place) else os.path.abspath(place)
    manifest = f"{place.rstrip('/')}/{MANIFEST}"
    if _ADDRESS.match(place):
        with tempfile.TemporaryDirectory() as scratch:
            path = os.path.join(scratch, MANIFEST)
            _download(manifest, path, _MANIFEST_BYTES)
            content = read_json(path)
    elif os.path.isfile(manifest):
        content = read_json(manifest)
    else:
        raise UsageError(
            f"there is no manifest {manifest}: ${PLACE} is to name a folder or an address with {MANIFEST}, which "
            "fairseq-adaptive zoo pack makes"
        )
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{manifest} has the format {content.get('format')!r:.20}, and this version reads {FORMAT}: update it"
        )
    archives, models = content.get("archives") or place, content.get("models")
    if not isinstance(archives, str) or not isinstance(models, list):
        raise UsageError(f"{manifest} is damaged: archives is to be a text, and models a list")
    entries = [_entry(each, manifest) for each in models]
    stems = [each.stem for each in entries]
    if len(set(stems)) < len(stems):
        raise UsageError(f"{manifest} is damaged: it has two entries of one name and version")
    return Zoo(manifest, archives.rstrip("/"), entries)


def _entry(content: Any, where) -> Entry:
    names = [field.name for field in fields(Entry)]
    if not isinstance(content, dict):
        raise UsageError(f"{where} is damaged: {content!r:.40} is no entry")
    missing = [name for name in names if name not in content]
    if missing:
        raise UsageError(f"{where}: the entry {content.get('name')!r:.40} is not complete: it lacks {missing[0]}")
    return Entry(**{name: content[name] for name in names}).check(where)


def as_manifest(entries: List[Entry], archives=None) -> Dict[str, Any]:
    """What ``zoo.json`` holds."""
    return {"format": FORMAT, "archives": archives, "models": [asdict(each) for each in entries]}


def local_model(name: str) -> str:
    """The folder of a model of the zoo, as :func:`fairseq_adaptive.hub.folder.write_folder` has written it: fetched, checked
    and unpacked unless it was before.

    Raises:
        UsageError: for an unknown name, what cannot be fetched, and what is not what the manifest says
    """
    zoo = read_zoo()
    entry = zoo.find(name)
    kept = cache("zoo") / f"{entry.stem}-{entry.sha256[:16]}"
    if kept.is_dir():
        return str(kept)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part.", dir=kept.parent) as scratch:
            archive = os.path.join(scratch, entry.file)
            fetch(zoo, entry, archive)
            with whole_folder(kept) as made:
                unpack(archive, entry, made)
    except UsageError:
        if not kept.is_dir():  # else another process was faster
            raise
    except OSError as error:
        raise UsageError(
            f"cannot keep {entry.file} in {kept.parent}: {error.strerror}; $FAIRSEQ_ADAPTIVE_CACHE names another folder"
        ) from error
    return str(kept)


def fetch(zoo: Zoo, entry: Entry, path) -> None:
    """Write an archive of a zoo to a new file, and check it.

    Raises:
        UsageError: where it is not there, cannot be fetched, or is not what the manifest says
    """
    source = f"{zoo.archives}/{entry.file}"
    if _ADDRESS.match(source):
        _download(source, path, entry.bytes)
    elif os.path.isfile(source):
        shutil.copyfile(source, path)  # a copy of our own: nobody changes it once it is checked
    else:
        raise UsageError(f"there is no {source}, which {zoo.manifest} lists")
    check_archive(path, entry, source)


def check_archive(path, entry: Entry, source) -> None:
    """
    Args:
        path: of the file
        entry: of the manifest
        source: where it came from, for the message

    Raises:
        UsageError: where its size or its SHA-256 is another one
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    size = os.path.getsize(path)
    if (size, found) != (entry.bytes, entry.sha256):
        raise UsageError(
            f"{source} is damaged or another version: it has {size} bytes and the checksum {found[:16]}..., the manifest "
            f"says {entry.bytes} and {entry.sha256[:16]}...; nothing of it was read"
        )


def unpack(archive, entry: Entry, folder) -> None:
    """Write the files of a checked archive to an empty folder: plain files below ``NAME-VERSION``, nothing else.

    Raises:
        UsageError: for an archive that is none, or holds something else
    """
    total = 0
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed:
                top, *rest = member.name.split("/")
                total += member.size
                plain = member.isreg() and top == entry.stem and rest and not {"", ".", ".."} & {*rest}
                if not plain or "\\" in member.name or total > UNPACKED:
                    raise UsageError(f"{entry.file} holds {member.name!r:.60}, which no archive of the zoo does")
                path = os.path.join(folder, *rest)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with packed.extractfile(member) as source, open(path, "xb") as target:
                    shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the archive's
        raise UsageError(f"{entry.file} is no archive of the zoo: {error}") from error


@contextlib.contextmanager
def _asked(address: str) -> Iterator:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "fairseq_adaptive"})
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            yield answer
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UsageError(
            f"cannot fetch {address}: {reason}; without network, ${PLACE} names a folder that has {MANIFEST} and the archives"
        ) from error


def _download(address: str, path, most: int) -> None:
    with _asked(address) as answer, open(path, "xb") as file:
        left = most + 1  # a byte too many is found by who checks the size
        while left and (block := answer.read(min(left, 1 << 20))):
            file.write(block)
            left -= len(block)
    if not left and os.path.basename(path) == MANIFEST:
        raise UsageError(f"{address} has more than {most} bytes: it is no manifest of a zoo")
