"""Which kinds of tokens a model skims, and before which layer."""

from typing import Dict, Iterable, List, NamedTuple

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report.depth_map import token_type
from fairseq_adaptive.report.pictures import colormap, pyplot, save_figure
from fairseq_adaptive.report.shading import Sentence, ink, ramp


class Kept(NamedTuple):
    """Of one kind of token how many there were, and for each layer the share of them that it computed."""

    tokens: int
    shares: List[float]


def kept_shares(sentences: Iterable[Sentence]) -> Dict[str, Kept]:
    """Count skimmed sentences by token type; ``all`` is the last.

    Raises:
        UsageError: when there are none, or nothing was skimmed by layer
    """
    counts: Dict[str, List[int]] = {}
    for sentence in sentences:
        if sentence.last is None:
            raise UsageError(
                "no tokens are skimmed in this model: to see where they halt, use fairseq-adaptive plot depth"
            )
        layers = sentence.limit - 1
        for token, following, depth in zip(sentence.tokens, [*sentence.tokens[1:], None], sentence.depths):
            kind = token_type(token, following)
            for name in (token if kind == "special" else kind, "all"):
                row = counts.setdefault(name, [0] * (layers + 1))
                row[0] += 1
                for layer in range(1, layers + 1):
                    row[layer] += depth > layer
    if not counts:
        raise UsageError("there is nothing to count: the texts have no tokens")
    order = sorted(counts, key=lambda name: (name == "all", -counts[name][0]))
    return {name: Kept(counts[name][0], [each / counts[name][0] for each in counts[name][1:]]) for name in order}


def format_shares(found: Dict[str, Kept]) -> str:
    """The shares as a table in Markdown, a column a layer."""
    layers = range(1, 1 + len(next(iter(found.values())).shares))
    lines = [
        f"| tokens computed by layer | tokens | {' | '.join(map(str, layers))} |",
        "|---|" + "---:|" * (1 + len(layers)),
    ]
    for name, kept in found.items():
        lines.append(f"| {name} | {kept.tokens:,} | {' | '.join(f'{share:.2f}' for share in kept.shares)} |")
    return "\n".join(lines) + "\n"


def shares_figure(found: Dict[str, Kept]):
    """A figure of matplotlib: a cell for each kind of token and each layer, with its share in the middle."""
    plt = pyplot()
    kinds, rows = list(found), [kept.shares for kept in found.values()]
    layers = len(rows[0])
    figure, panel = plt.subplots(figsize=(2.8 + 0.6 * layers, 1.2 + 0.36 * len(kinds)), layout="constrained")
    image = panel.imshow(rows, vmin=0, vmax=1, cmap=colormap(), aspect="auto")
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            panel.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=8, color=ink(ramp(share)))
    panel.set_xticks(range(layers), range(1, layers + 1))
    panel.set_yticks(range(len(kinds)), [f"{name} ({kept.tokens:,})" for name, kept in found.items()])
    panel.set_xlabel("layer")
    figure.colorbar(image, ax=panel, label="share computed")
    return figure


def plot_shares(found: Dict[str, Kept], path) -> None:
    """Draw :func:`shares_figure` as a PNG or what else the ending says.

    Raises:
        UsageError: when the file is there already, or matplotlib is not installed
    """
    save_figure(shares_figure(found), path, dpi=120)
