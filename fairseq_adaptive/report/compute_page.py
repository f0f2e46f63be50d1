"""The numbers of :func:`~fairseq_adaptive.report.compute_report.compute_report` as one page, with bars; it loads nothing."""

import html
from typing import Any, Dict, List, Sequence, Tuple

from fairseq_adaptive.report.compute_table import Table, by_depth, names, overview, parts_of, short
from fairseq_adaptive.report.costs import PARTS

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1b1f;--line:#d5d5dc;--dense:#d9d9e0;
--c0:#7a5195;--c1:#2f6db5;--c2:#d9822b;--c3:#c2324e;--c4:#4b8b3b;--c5:#777}
@media screen and (prefers-color-scheme:dark){:root{--back:#17171b;--text:#e8e8ee;--line:#3a3a44;--dense:#44444f;
--c0:#b48fd0;--c1:#6ba5ea;--c2:#f0a657;--c3:#f0718a;--c4:#86c774;--c5:#999}}
body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;background:var(--back);color:var(--text)}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:bottom;min-width:3.5em;
max-width:11rem;overflow-wrap:anywhere}
th:first-child{text-align:left;white-space:pre-wrap;position:sticky;left:0;background:var(--back);overflow-wrap:normal;
min-width:0;max-width:none}
@media(max-width:40rem){th,td{padding:.2rem .3rem}.overview th:first-child{max-width:8.5rem}}
.depths th{overflow-wrap:normal}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:.25rem .6rem;align-items:center;margin:.6rem 0}
.bars svg{width:100%;height:1rem;display:block}.bars b{font-weight:400;overflow-wrap:anywhere;max-width:40vw}
.item{white-space:nowrap;margin-right:1em}.key{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
.c0{fill:var(--c0);background:var(--c0)}.c1{fill:var(--c1);background:var(--c1)}.c2{fill:var(--c2);background:var(--c2)}
.c3{fill:var(--c3);background:var(--c3)}.c4{fill:var(--c4);background:var(--c4)}.c5{fill:var(--c5);background:var(--c5)}.dense{fill:var(--dense);background:var(--dense)}
@media print{body{max-width:none;padding:0}h2{break-after:avoid}.bars,tr{break-inside:avoid}.wide{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
_KEY = '<span class="item"><span class="key {}"></span>{}</span>'


def to_html(report: Dict[str, Any]) -> str:
    """A page of its own: the tables, and of each model bars of its cost by part and by depth, before a bar of its
    counterpart's."""
    table = overview(report)
    dense = any(model["counterpart"] is not None for model in report["models"])
    legend = _legend(parts_of(report), dense)
    parts = [_table(table, "overview"), "<h2>Multiply-adds a text, by part</h2>", legend, _by_part(report)]
    depths = iter(by_depth(report))
    for model in report["models"]:
        for found in model["stacks"].values():
            parts += [_table(next(depths)), _by_depth(found["depths"], model["texts"])]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Compute report</title><style>{_STYLE}</style></head>\n<body><h1>Compute report</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(table: Table, kind: str = "depths") -> str:
    def row(cells, tag):
        first, *rest = map(html.escape, cells)
        return f'<tr><th scope="row">{first}</th>{"".join(f"<{tag}>{cell}</{tag}>" for cell in rest)}</tr>'

    rows = "\n".join(row(each, "td") for each in table.rows)
    head = row(table.columns, "th").replace('scope="row"', 'scope="col"')
    return f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table class="{kind}">{head}\n{rows}</table></div>'


def _legend(parts: Sequence[str], dense: bool) -> str:
    keys = [(f"c{PARTS.index(part)}", part) for part in parts] + [("dense", "counterpart")] * dense
    return f"<p>{' '.join(map(_KEY.format, *zip(*keys)))}</p>"


def _by_part(report) -> str:
    rows = []
    for model, name in zip(report["models"], names(report)):
        costs = model["multiply_adds"]
        whole = (
            None if model["counterpart"] is None else model["counterpart"]["multiply_adds"]["total"] / model["texts"]
        )
        rows.append((name, [(part, costs[part] / model["texts"]) for part in PARTS], whole))
    return _bars(rows)


def _by_depth(depths: List[Dict], texts: int) -> str:
    rows = []
    for row in depths:
        dense = row.get("counterpart_multiply_adds")
        spent = [(part, row["multiply_adds"][part] / texts) for part in PARTS[1:4]]
        rows.append((str(row["depth"]), spent, None if dense is None else dense / texts))
    return _legend(PARTS[1:4], any(dense is not None for *_, dense in rows)) + _bars(rows)


def _bars(rows: List[Tuple[str, List[Tuple[str, float]], Any]]) -> str:
    """Bars of one scale: a name, its parts one after the other, and behind them what the counterpart takes."""
    most = max(max(sum(value for _, value in parts), dense or 0.0) for _, parts, dense in rows) or 1.0
    lines = []
    for name, parts, dense in rows:
        total, shapes, start = sum(value for _, value in parts), [], 0.0
        if dense is not None:
            shapes.append(f'<rect class="dense" width="{100 * dense / most:.2f}" height="10"/>')
        for part, value in filter(lambda pair: pair[1], parts):
            width = 100 * value / most
            title = f"<title>{part} {short(value)}</title>"
            place = f'x="{start:.2f}" y="1.5" width="{width:.2f}" height="7"'
            shapes.append(f'<rect class="c{PARTS.index(part)}" {place}>{title}</rect>')
            start += width
        drawing = "".join(shapes)
        lines.append(
            f'<b>{html.escape(name)}</b><svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
            f'aria-label="{html.escape(name)}: {short(total)}">{drawing}</svg><span>{short(total)}</span>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'
