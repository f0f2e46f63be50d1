"""No flag, default, range or preset changes without a commit that shows it."""

import difflib

import frozen_flags
from fairseq.models import ARCH_CONFIG_REGISTRY


def _difference(text):
    lines = difflib.unified_diff(frozen_flags.FILE.read_text(encoding="utf-8").splitlines(), text.splitlines(), n=2)
    return "\n".join(list(lines)[2:])


def test_flags_are_those_of_the_file():
    difference = _difference(frozen_flags.frozen())
    assert not difference, (
        f"flags have changed:\n{difference}\nwhere that is meant, run {frozen_flags.COMMAND}, say it on the page of the "
        "flag, and commit tests/frozen_flags.txt"
    )


def test_file_has_all():
    text = frozen_flags.FILE.read_text(encoding="utf-8")
    for kind, least in (("model", 9), ("task", 5), ("criterion", 9), ("optimizer", 2), ("preset", 30)):
        assert sum(line.startswith(f"{kind} ") for line in text.splitlines()) >= least, kind
    assert sum(line.startswith("  --") for line in text.splitlines()) > 450


def test_a_change_is_seen(monkeypatch):
    name = "shared_transformer_tiny"
    stock = ARCH_CONFIG_REGISTRY[name]

    def changed(args):
        args.encoder_layers = 7
        stock(args)

    changed.__module__ = stock.__module__
    monkeypatch.setitem(ARCH_CONFIG_REGISTRY, name, changed)
    assert "+  encoder_layers = 7" in _difference(frozen_flags.frozen())
