"""Whether a file that torch wrote still holds what was written, and which checkpoint beside it does."""

import os
import re
import zipfile
from typing import Optional

_CHUNK = 2**22


def damage(path) -> Optional[str]:
    """What is wrong with a file of :func:`torch.save`; None where nothing is, or where nothing can be told.

    ``torch.save`` writes a checksum (CRC-32) of every part into the file, which ``torch.load`` does not look at: a bit
    that flipped on a disk or on the way would be a weight. Files of torch before 1.6 have none, nor have those that were
    written with ``torch.serialization.set_crc32_options(False)``.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return None
            with zipfile.ZipFile(file) as parts:
                for part in parts.infolist():
                    if part.CRC:  # else torch wrote none
                        with parts.open(part) as content:
                            while content.read(_CHUNK):
                                pass
    except OSError:
        return None  # who opens it says why
    except zipfile.BadZipFile as error:
        changed = re.search(r"Bad CRC-32 for file '(?:[^/']*/)?(.*)'", str(error))
        return f"the bytes of {changed[1]} in it are not those that were written" if changed else "it is cut short"
    except Exception:  # flipped bits of sizes, flags and names make zipfile raise anything
        return "its list of contents is not what was written"
    return None


def _whole(path):
    try:
        with zipfile.ZipFile(path) as parts:
            return any(name.endswith("/data.pkl") for name in parts.namelist()) and damage(path) is None
    except (OSError, zipfile.BadZipFile):
        return False


def newest_whole(path) -> Optional[str]:
    """The checkpoint beside ``path``, of the same shard, that was written last of those that are whole."""
    folder, name = os.path.split(os.fspath(path))
    pattern = r"checkpoint[^-]*(-.*)?\.pt"
    this = re.fullmatch(pattern, name)
    if not this:
        return None
    with os.scandir(folder or ".") as entries:
        beside = [entry for entry in entries if entry.is_file() and entry.name != name]
    alike = [entry for entry in beside if (other := re.fullmatch(pattern, entry.name)) and other[1] == this[1]]
    for entry in sorted(alike, key=lambda entry: entry.stat().st_mtime_ns, reverse=True):
        if _whole(os.path.join(folder, entry.name)):
            return os.path.join(folder, entry.name)
    return None


def advice(path) -> str:
    """What to do about a checkpoint that is damaged."""
    newest = newest_whole(path)
    if newest is None:
        return "take another checkpoint"
    name = os.path.basename(path)
    if name.startswith("checkpoint_last"):
        return f"the newest whole one is {newest}: copy it to {name} and run the same command again to go on from it"
    return f"the newest whole one beside it is {newest}"
