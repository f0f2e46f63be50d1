"""Quality over measured time of models from any number of compute reports."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.report.compute_table import names
from fairseq_adaptive.report.pictures import pyplot, save_figure

HIGHER = ("accuracy", "bleu", "f1", "exact", "mcc", "pearson_and_spearman", "acc_and_f1")  # is better
LOWER = ("ppl", "nll_loss", "loss")
SAME = ("subset", "batch_size", "device", "threads")  # else times do not compare
COSTS = {"time": "ms a text", "multiply-adds": "million multiply-adds a text", "memory": "peak memory, MiB"}


class Point(NamedTuple):
    """A model: its name, what it costs, and how good it is; ``dense`` is the cost of its counterpart, or None."""

    name: str
    cost: float
    quality: float
    dense: Optional[float]


def read_report(path) -> Dict[str, Any]:
    """A report that ``fairseq-adaptive report --json`` wrote.

    Raises:
        UsageError: when the file is none
    """
    found = read_json(path)
    try:
        for model in found["models"]:
            for each in filter(None, (model, model["counterpart"])):
                float(each["seconds"]), float(each["multiply_adds"]["total"])
            str(model["checkpoint"]), float(model["texts"]), dict(model["quality"] or {})
        found["models"][0], [found[name] for name in SAME]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} was not written by fairseq-adaptive report --json: {error!r}") from None
    return found


def series(reports: Sequence[Dict], over: str = "time", quality: Optional[str] = None) -> Dict[str, Any]:
    """The points of reports.

    Args:
        reports: of :func:`read_report`
        over: one of :data:`COSTS`
        quality: which logged value (default: the first of :data:`HIGHER` and :data:`LOWER` that all models have)

    Returns:
        ``quality``, its name, and ``points``, a list for each report, each in the order of the costs

    Raises:
        UsageError: when reports do not compare, or a model lacks the quality or the cost
    """
    for name in SAME:
        values = list(dict.fromkeys(str(each[name]) for each in reports))
        if len(values) > 1:
            raise UsageError(f"the reports do not compare: their {name} is {' and '.join(values)}; measure them alike")
    models = [model for each in reports for model in each["models"]]
    shared = [name for name in models[0]["quality"] or {} if all(_number(model, name) for model in models)]
    if not shared:
        raise UsageError("the models have no quality in common: make the reports without --no-quality, of one task")
    if quality is None:
        quality = next((name for name in (*HIGHER, *LOWER) if name in shared), shared[0])
    if quality not in shared:
        raise UsageError(f"not every model has {quality}: choose one of {', '.join(shared)}")
    called = [each.rpartition("/") for each in names({"models": models})]
    same = len({file for *_, file in called}) == 1 and all(folder for folder, *_ in called)
    called = iter(folder if same else "".join((folder, slash, file)) for folder, slash, file in called)
    points = []
    for each in reports:
        found = []
        for model in each["models"]:
            counterpart = model["counterpart"]
            dense = None if counterpart is None else _cost(counterpart, model["texts"], over)
            cost = _cost(model, model["texts"], over)
            if cost is None:
                raise UsageError(f"{model['checkpoint']} has no {over} in its report: choose another --over")
            found.append(Point(next(called), cost, float(model["quality"][quality]), dense))
        points.append(sorted(found, key=lambda point: point.cost))
    return {"quality": quality, "points": points}


def _number(model, name):
    return isinstance((model["quality"] or {}).get(name), (int, float))


def _cost(each, texts, over) -> Optional[float]:
    if over == "time":
        return 1000 * each["seconds"] / texts
    if over == "multiply-adds":
        return each["multiply_adds"]["total"] / texts / 1e6
    return None if each.get("peak_memory_bytes") is None else each["peak_memory_bytes"] / 2**20


def tradeoff_figure(reports: Sequence[Dict], titles: List[str], over: str = "time", quality: Optional[str] = None):
    """A figure of matplotlib: a line for each report, a point with its name for each model, and a thin line to what its
    counterpart costs, whose quality is not measured."""
    found = series(reports, over, quality)
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    widest = max(max(point.cost, point.dense or 0.0) for points in found["points"] for point in points)
    for number, (title, points) in enumerate(zip(titles, found["points"])):
        costs, qualities = [point.cost for point in points], [point.quality for point in points]
        panel.plot(costs, qualities, color=f"C{number % 10}", marker="o", label=title, zorder=2)
        for point in points:
            right = point.cost < 0.6 * widest  # where its name has room
            panel.annotate(
                point.name,
                (point.cost, point.quality),
                xytext=(6 if right else -6, 5),
                textcoords="offset points",
                ha="left" if right else "right",
                fontsize=8,
            )
            if point.dense is not None:
                panel.plot([point.cost, point.dense], [point.quality] * 2, color="0.75", linewidth=1, zorder=1)
                panel.plot(point.dense, point.quality, marker="|", markersize=9, color="0.55", zorder=1)
    if any(point.dense is not None for points in found["points"] for point in points):
        panel.plot(
            [], [], color="0.75", linewidth=1, marker="|", markeredgecolor="0.55", label="cost with all policies off"
        )
    name = found["quality"]
    better = " (higher is better)" if name in HIGHER else " (lower is better)" if name in LOWER else ""
    where = f"{reports[0]['subset']}, batches of {reports[0]['batch_size']}, {reports[0]['device']}"
    panel.set(xlabel=f"{COSTS[over]} ({where})", ylabel=f"{name}{better}")
    panel.margins(y=0.12)
    panel.set_xlim(0, 1.06 * widest)
    panel.legend(fontsize=8)
    return figure


def plot_tradeoff(reports: Sequence[Dict], titles: List[str], path, over: str = "time", quality=None) -> None:
    """Draw :func:`tradeoff_figure` as a PNG or what else the ending says.

    Raises:
        UsageError: as :func:`series`; when the file is there already, or matplotlib is not installed
    """
    save_figure(tradeoff_figure(reports, titles, over, quality), path, dpi=120)
