"""How deep a model goes at every token of raw text, and what that depends on."""

import math
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.ranges import BATCH
from fairseq_adaptive.report.pictures import pyplot, save_figure
from fairseq_adaptive.report.shading import WORD_START, Sentence, legend, ramp, to_fragment, to_html, to_text  # noqa: F401  some were here once

TENTHS = 10


def halting_stack(model) -> str:
    """Name of the encoder's stack in which tokens halt.

    Raises:
        UsageError: when there is none
    """
    for name, module in model.named_modules():
        if name.startswith("encoder.") and isinstance(module, LayerStack) and module.halting is not None:
            return name
    raise UsageError("the model has no encoder in which tokens halt: train one with --halting act")


@torch.no_grad()
def read_depths(
    model, dictionary, texts: Iterable[List[str]], batch_size: int = 16, longest: Optional[int] = None
) -> Iterator[Sentence]:
    """Run an encoder over texts.

    Args:
        model: a fairseq model with an encoder in which tokens halt; put into evaluation mode
        dictionary: of its source
        texts: tokens of each; those that are too long are read in parts, empty ones are left out
        batch_size: texts at a time
        longest: tokens of a text, special ones included (default: what the model can read)

    Raises:
        UsageError: for another model, or a batch size below 1
    """
    from fairseq.data import data_utils  # else plain torch is enough here

    BATCH.check(batch_size, "batch_size")
    name, encoder = halting_stack(model.eval()), model.encoder
    cls = [dictionary.bos()] if hasattr(model, "sentence_order") else []
    if longest is None:
        longest = encoder.max_positions()
    room = longest - len(cls) - 1
    device = next(model.parameters()).device
    parts = [(text[start : start + room], start > 0) for text in texts for start in range(0, len(text), room)]
    for first in range(0, len(parts), batch_size):
        rows = [
            torch.tensor([*cls, *(dictionary.index(token) for token in part), dictionary.eos()])
            for part, _ in parts[first : first + batch_size]
        ]
        tokens = data_utils.collate_tokens(rows, dictionary.pad()).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        with recording(model) as traces:
            if cls:
                encoder(tokens, features_only=True)
            else:
                encoder(tokens, src_lengths=lengths)
        (trace,) = traces[name]
        for (part, continued), updates in zip(parts[first : first + batch_size], trace.updates.tolist()):
            shown = [*(["[CLS]"] if cls else []), *part, "[SEP]" if cls else "</s>"]
            yield Sentence(shown, updates[: len(shown)], trace.most, continued=continued)


def token_type(token: str, following: Optional[str]) -> str:
    """What kind of token it is, given the one behind it in the text.

    Returns:
        ``special``, ``punctuation``, ``number``, ``whole word``, ``start of a word`` or ``inside a word``
    """
    if token.startswith(("[", "<")) and token.endswith(("]", ">")) and len(token) > 2:
        return "special"
    bare = token.removeprefix(WORD_START)
    if not any(letter.isalnum() for letter in bare):
        return "punctuation"
    if any(letter.isdigit() for letter in bare):
        return "number"
    if not token.startswith(WORD_START):
        return "inside a word"
    goes_on = following is not None and following[:1].isalpha()
    return "start of a word" if goes_on else "whole word"


Table = Dict[str, Dict[str, Tuple[int, float]]]


def depth_tables(sentences: Iterable[Sentence]) -> Table:
    """Mean depth by frequency rank, place and type of the tokens, after the analysis of Simoulin and Crabbe (2021).

    Ranks are those in these texts, in ranges that double. Places are tenths of a text. Special tokens count among the
    types only.

    Returns:
        for each of the three, by its range or name in order, how many tokens there were and their mean depth

    Raises:
        UsageError: when there are no tokens but special ones
    """
    by_token: Dict[str, List[int]] = {}
    tables = {name: {} for name in ("frequency rank", "part of the text", "token type")}

    def count(table, name, number, total):
        sums = tables[table].setdefault(name, [0, 0.0])
        sums[0] += number
        sums[1] += total

    for sentence in sentences:
        following = [*sentence.tokens[1:], None]
        kinds = [token_type(token, behind) for token, behind in zip(sentence.tokens, following)]
        plain = [place for place, kind in enumerate(kinds) if kind != "special"]
        for place, (token, depth, kind) in enumerate(zip(sentence.tokens, sentence.depths, kinds)):
            count("token type", token if kind == "special" else kind, 1, depth)
            if kind != "special":
                sums = by_token.setdefault(token, [0, 0])
                sums[0] += 1
                sums[1] += depth
        for number, place in enumerate(plain):
            count("part of the text", number * TENTHS // len(plain), 1, sentence.depths[place])
    if not by_token:
        raise UsageError("there is nothing to count: the texts have no tokens")
    for rank, (number, total) in enumerate(sorted(by_token.values(), key=lambda sums: -sums[0]), 1):
        count("frequency rank", int(math.log2(rank)), number, total)
    names = {
        "frequency rank": lambda power: f"{2**power}-{2 ** (power + 1) - 1}" if power else "1",
        "part of the text": lambda tenth: f"{tenth + 1}/{TENTHS}",
        "token type": str,
    }
    return {
        table: {names[table](name): (number, total / number) for name, (number, total) in sorted(rows.items())}
        for table, rows in tables.items()
    }


def format_tables(tables: Table) -> str:
    """The tables in Markdown."""
    return "\n".join(
        f"| {table} | tokens | mean updates |\n|---|---:|---:|\n"
        + "".join(f"| {name} | {number:,} | {mean:.2f} |\n" for name, (number, mean) in rows.items())
        for table, rows in tables.items()
    )


def plot_tables(tables: Table, limit: int, path: str):
    """Draw the tables side by side as a PNG or what else the ending says.

    Raises:
        UsageError: when matplotlib is not installed
    """
    save_figure(tables_figure(tables, limit), path, dpi=120)


def tables_figure(tables: Table, limit: int):
    """What :func:`plot_tables` draws: a panel for each table, a bar for each of its rows, in the colour of its depth."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(tables), figsize=(5 * len(tables), 4), sharey=True, layout="constrained")
    for panel, (table, rows) in zip(panels, tables.items()):
        means = [mean for _, mean in rows.values()]
        colours = [ramp((mean - 1) / max(1, limit - 1)) for mean in means]
        panel.bar(list(rows), means, color=colours, edgecolor="0.4", linewidth=0.5)
        panel.set(xlabel=table, ylim=(0, limit))
        panel.tick_params(axis="x", rotation=90)
    panels[0].set_ylabel("mean updates")
    return figure
