"""docs/composition.md, made of what :mod:`composition` says and of the words with which models refuse."""

import itertools

from composition import FAMILIES, KV, READERS, ROUTERS, RULES, SCHEDULES, Case, made, reasons
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.pairing import ANSWERS

HEAD = """# What composes

Written by `python tests/test_composition.py`, and compared with the code by `tests/test_composition.py`: every line here is
tried there. A router says who is computed at a depth, a halting rule who is done after it, a reader who joins; each is a
flag of every family (`--router`, `--halting`, `--reader`; for one side of an encoder-decoder `--encoder-router` and so on).
What is refused is refused before any work starts, with one of the reasons below. Policies of your own
([add-a-mechanism](add-a-mechanism.md)) compose like these.

What composes does so dense (training) and packed (inference), which agree to rounding, alone and in any batch; in decoders
one token at a time, too.
"""
KV_HEAD = """
## What others see of a token that is not computed

`--router-kv` says it of a token that the router leaves out (default `active`), `--halting-kv` of one that is done (default
`recompute`).

| answer | what others see | `--router-kv` | `--halting-kv` |
|---|---|---|---|
"""
MEANING = {
    "recompute": "the keys and values of the state that it has, by this depth's maps",
    "keep": "those that it had when this layer last ran for it",
    "active": "nothing: it is invisible",
    "first": "those that its layer made first, of all tokens; one cache a layer in decoding",
    "last": "those of the layer's last repeat",
}
LAST = """
`last` is refused everywhere. All tokens run a depth together, so that at a layer's first repeat nobody has the keys of its
last one. In an encoder each token would wait for all others, and they for it: there is no order in which to compute them.
In a decoder there is one, token after token, which takes as many passes as a sentence has tokens to train.

"""
TAPE = "its own, `--tape-tokens`"


def _sorted_out(name, values, **fixed):
    """Which of some values of a dimension are legal and which are not, each beside the defaults."""
    found = {value: not reasons(Case(**{**fixed, name: value})) for value in values}
    return [v for v, legal in found.items() if legal], [v for v, legal in found.items() if not legal]


def _list(values):
    return ", ".join(f"`{value}`" for value in values) or "none"


def _families():
    lines = [
        "",
        "## Families",
        "",
        "| family | routers | halting rules | readers | sharing of 6 depths |",
        "|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        if family.side:
            continue
        at = {"family": name, "schedule": "cycle" if "cycle" in family.schedules else family.schedules[0]}
        router = ROUTERS[1:] if any(not reasons(Case(router=each, **at)) for each in ROUTERS[1:]) else ()
        routers = [each for each in router if not all(reasons(Case(name, s, each)) for s in family.schedules)]
        rules, missing = _sorted_out("rule", RULES[1:], **at)
        if name == "shared_transformer":
            rules, note = [*rules, "margin"], " (`margin` in the decoder alone)"
        else:
            note = f" (not {_list(missing)})" if missing else ""
        readers = ("`tape` (encoder)" if name == "shared_transformer" else "`tape`") if family.reads else "none"
        readers = TAPE if family.arch.startswith("adatape") else readers
        shared = [each for each in family.schedules if not reasons(Case(name, each))]
        sharing = "any" if len(shared) == len(SCHEDULES) else ", ".join(SCHEDULES[each][2] for each in shared)
        lacking = [each for each in ROUTERS[1:] if each not in routers]
        every = _list(routers) if len(lacking) > len(routers) else f"all but {_list(lacking)}" if lacking else "all"
        if name == "shared_transformer":
            every = "all (`token_merging` in the encoder alone)"
        rules = "all" if len(rules) == len(RULES) - 1 else "all but " + _list(missing) if missing else _list(rules)
        lines.append(f"| `{name}` | {every} | {rules}{note if rules == 'all' else ''} | {readers} | {sharing} |")
    return lines


def _pairs():
    """Router x rule, in a language model whose schedule suits all, or an encoder that scores words."""
    decoder, encoder = Case("shared_transformer_lm", "middle_cycle"), Case("albert_act", "one")
    lines = ["", "## Routers and halting rules", "", f"| | {' | '.join(f'`{rule}`' for rule in RULES)} |"]
    lines.append("|---" * (1 + len(RULES)) + "|")
    for router in ROUTERS:
        at = encoder if router == "token_merging" else decoder
        cells = ["yes" if not reasons(at._replace(router=router, rule=rule)) else "refused" for rule in RULES]
        lines.append(f"| `{router}` | {' | '.join(cells)} |")
    return lines


def _answers():
    lines = []
    for answer in ANSWERS:
        left = [
            f"{router} ({', '.join(where)})" if len(where) < len(good) else router
            for router in ROUTERS[1:]
            if (good := [each for each in SCHEDULES if not reasons(Case("its encoder alone", each, router))])
            and (
                where := [
                    each for each in good if not reasons(Case("its encoder alone", each, router, router_kv=answer))
                ]
            )
        ]
        done = [
            each for each in SCHEDULES if not reasons(Case("shared_transformer", each, rule="act", halting_kv=answer))
        ]
        halted = "yes" if len(done) == len(SCHEDULES) else f"with sharing {', '.join(done)}" if done else "refused"
        routed = "yes" if left == list(ROUTERS[1:]) else "; ".join(left) or "refused"
        lines.append(f"| `{answer}` | {MEANING[answer]} | {routed} | {halted} |")
    return lines


def _reasons():
    """Each message that some case gets, and the first case that does."""
    found = {}
    for family, router, rule, reader, pair in itertools.product(
        FAMILIES,
        ROUTERS,
        RULES,
        READERS,
        (*((None, kv) for kv in KV), *((kv, None) for kv in KV), ("recompute", "first")),
    ):
        for schedule in FAMILIES[family].schedules:
            case = Case(family, schedule, router, rule, reader, *pair)
            known = reasons(case)
            if len(known) == 1 and known[0] not in found and not (FAMILIES[family].side and reader != "none"):
                found[known[0]] = case
    lines = ["", "## What is refused, and why", ""]
    for case in found.values():
        try:
            made(case)
        except UsageError as error:
            lines.append(f"- {error}")
    return lines


def page() -> str:
    """The whole page."""
    shares = ["", "Sharing, by the layer that serves each of 6 depths:", ""]
    shares += [f"- {name}: {SCHEDULES[name][2]}" for name in SCHEDULES]
    return "\n".join(
        [
            HEAD.rstrip(),
            *_families(),
            *shares,
            *_pairs(),
            KV_HEAD.rstrip("\n"),
            *_answers(),
            LAST.rstrip(),
            *_reasons(),
            "",
        ]
    )
