"""Every flag of every family changes what a model is or answers, or it is said that it does not."""

import logging

import pytest
from fairseq.models import MODEL_REGISTRY
from models.flag_cases import BASE, CONTEXTS, REFUSED, SAID, SILENT, VALUES, lookup, portrait, same
from old_checkpoints.cases import flags_of, task

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.without_effect import check_model_flags
from fairseq_adaptive.report.flags import flags_of as declared

FLAGS = [(family, flag) for family in BASE for flag in declared(MODEL_REGISTRY[family])]
FLAGS_AND_FAMILIES = [(family, flag.dest) for family, flag in FLAGS]
_KNOWN = {}


def _plain(family, context):
    """The portrait of a model, made once; None where it is refused."""
    key = family, repr(sorted(context.items()))
    if key not in _KNOWN:
        _KNOWN[key] = _refused_or_portrait(family, context)
    return _KNOWN[key]


def _refused_or_portrait(family, given):
    try:
        check_model_flags(flags_of(family, {**BASE[family], **given}), MODEL_REGISTRY[family])
        return portrait(family, given)
    except UsageError:
        return None


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A file of embeddings of width 8."""
    path = tmp_path_factory.mktemp("embeddings") / "embeddings.txt"
    words = task().dictionary.symbols[4:]
    lines = [f"{len(words)} 8", *(f"{word} {' '.join(['0.5'] * 8)}" for word in words)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def said(caplog):
    """``said(family, flags)``: what a training says before it starts of flags that change nothing."""

    def said(family, given):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fairseq_adaptive.models.without_effect"):
            check_model_flags(flags_of(family, {**BASE[family], **given}), MODEL_REGISTRY[family])
        return caplog.text

    return said


def _other(family, flag, embeddings):
    if flag.dest.endswith("embed_path"):
        return embeddings
    if flag.takes == "switch":
        return not BASE[family].get(flag.dest, False)
    value = lookup(VALUES, family, flag.dest)
    assert value is not None, f"{flag.name} is new: write another value of it to VALUES in tests/models/flag_cases.py"
    assert value != BASE[family].get(flag.dest, flag.default)
    return value


@pytest.mark.parametrize("family, flag", FLAGS, ids=[f"{family}-{flag.dest}" for family, flag in FLAGS])
def test_flag(family, flag, embeddings, said):
    given = {flag.dest: _other(family, flag, embeddings)}
    refused, warned = lookup(REFUSED, family, flag.dest), lookup(SAID, family, flag.dest)
    if refused is not None:
        with pytest.raises((UsageError, ImportError), match=refused):
            portrait(family, given)
            said(family, given)
        return
    mine, silent = f"{flag.name} without ", lookup(SILENT, family, flag.dest) is not None
    context = lookup(CONTEXTS, family, flag.dest, {})
    if context or silent or warned is not None:
        alone = _refused_or_portrait(family, given)
        if alone is not None:
            assert same(_plain(family, {}), alone), "it does change something: correct the tables"
            about = said(family, given)
            assert (mine in about) == (not silent) and (warned or "") in about, "what it needs is not said"
    if context or not (silent or warned is not None):
        assert mine not in said(family, {**context, **given})
        assert not same(_plain(family, context), portrait(family, {**context, **given})), (
            f"{flag.name} changes nothing: mend that; or let a training warn of it, in models/without_effect.py, and write "
            "what it needs to CONTEXTS in tests/models/flag_cases.py"
        )


def test_tables_have_no_more(said):
    flags = {*FLAGS_AND_FAMILIES, *(name for _, name in FLAGS_AND_FAMILIES)}
    for table in (VALUES, CONTEXTS, REFUSED, SAID, SILENT):
        assert set(table) <= flags
