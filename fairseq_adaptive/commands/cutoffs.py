"""Finds the cutoffs that make an adaptive softmax fastest for a vocabulary, and prints the flags to use them."""

import logging

from fairseq_adaptive.command import device
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import COUNT, FACTOR, WIDTH, Parser, Range


def costs(text):
    from fairseq_adaptive.report.cutoffs import Costs

    try:
        floor, offset, mac, *rest = map(float, text.split(","))
        return Costs(floor, offset, mac, *rest)
    except (TypeError, ValueError):
        raise UsageError(f"--costs takes FLOOR,OFFSET,MAC[,LOGIT[,WEIGHT]], numbers of 0 or more, not {text}") from None


def clusters(text):
    return text if text == "auto" else Range(int, 1, 1000)(text)


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dictionary", metavar="FILE", help="dict.txt of fairseq-preprocess")
    source.add_argument(
        "--counts", metavar="FILE", help="one count a line, or word and count, without special symbols, as in dict.txt"
    )
    price = parser.add_mutually_exclusive_group(required=True)
    price.add_argument(
        "--calibrate",
        action="store_true",
        help="measure what softmaxes cost on this device, and then the cutoffs found, beside what was predicted (1 "
        "minute); prints a --costs for later; needs scipy",
    )
    price.add_argument(
        "--costs",
        metavar="FLOOR,OFFSET,MAC[,LOGIT[,WEIGHT]]",
        help="a softmax takes max(FLOOR, OFFSET + MAC x multiply-adds + LOGIT x logits + WEIGHT x "
        "weights) ms, forward and backward; the last three for 10^9 of them",
    )
    parser.add_argument("--hidden-dim", type=WIDTH, required=True, metavar="N", help="width of the model")
    parser.add_argument(
        "--factor",
        type=FACTOR,
        default=1.0,
        metavar="X",
        help="each cluster is this much narrower than the one before (default: 1). Narrow clusters are "
        "fast but predict worse, which is no part of the costs: see --least-head",
    )
    parser.add_argument(
        "--tokens", type=COUNT, default=2048, metavar="N", help="targets in a batch of one device (default: 2048)"
    )
    parser.add_argument(
        "--clusters",
        type=clusters,
        default="auto",
        metavar="K",
        help="number of clusters, the first one (the head) among them, or auto (default): the fewest of 1 to 6 that take at "
        "most 3%% longer than the best, as predicted, and with --calibrate as measured",
    )
    parser.add_argument(
        "--least-head",
        type=Range(int, 4, 1 << 24),
        default=4,
        metavar="N",
        help="keep at least this many entries in the first cluster, with fairseq's four special symbols (default: 4)",
    )
    parser.add_argument("--device", type=device, help="for --calibrate (default: cuda where there is one, else cpu)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the cost of 1 to 6 clusters")
    args = parser.parse_args(argv)

    import torch

    from fairseq_adaptive.report.calibration import measure_costs, measure_cutoffs, require_scipy
    from fairseq_adaptive.report.cutoffs import (
        Costs,
        Shape,
        best_clusters,
        few_enough,
        optimal_cutoffs,
        plot_times,
        read_counts,
    )
    from fairseq_adaptive.report.pictures import require_picture

    logging.disable(logging.INFO)  # importing fairseq lets everybody's debugging messages through
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(args.hidden_dim, args.factor, args.tokens)
    if args.plot:
        require_picture(args.plot)
    given = costs(args.costs) if args.costs else None
    counts = read_counts(args.dictionary or args.counts, bool(args.dictionary))
    if given is None:
        require_scipy()
    if args.clusters != "auto":  # so that too many are refused before anything is measured
        optimal_cutoffs(counts, args.clusters, given or Costs(0, 0, 1), shape, args.least_head)
    measures = given is None
    if measures:
        given = measure_costs(shape, args.device)
        values = (given.floor, given.offset, given.mac, given.logit, given.weight)
        print(f"measured on {args.device}: --costs {','.join(f'{value:.4g}' for value in values)}")
    full = optimal_cutoffs(counts, 1, given, shape, args.least_head)
    found = []
    if args.clusters == "auto" or args.plot:
        found = best_clusters(counts, given, shape, args.least_head)
        for cutoffs, time in found:
            flag = ",".join(map(str, cutoffs)) or "none"
            speed = full[1] / time
            print(f"{len(cutoffs) + 1} clusters: {time:.2f} ms, {speed:.2f} x the full softmax, cutoffs {flag}")
    if args.clusters == "auto":
        tried = found
    else:
        tried = [full] * bool(args.clusters > 1) + [
            optimal_cutoffs(counts, args.clusters, given, shape, args.least_head)
        ]
    measured = measure_cutoffs([each[0] for each in tried], counts, shape, args.device) if measures else None
    best = few_enough(measured or [time for _, time in tried]) if args.clusters == "auto" else len(tried) - 1
    if args.plot:
        plot_times(found, args.plot, f"{len(counts)} words, width {args.hidden_dim}, {args.tokens} tokens")
        print("wrote", args.plot)
    for (cutoffs, time), taken in zip(tried, measured or []):
        print(
            f"{len(cutoffs) + 1} clusters: measured {taken:.2f} ms, {measured[0] / taken:.2f} x the full softmax; predicted "
            f"{time:.2f} ms"
        )
    cutoffs, time = tried[best]
    print(f"predicted: {time:.2f} ms a batch, {full[1] / time:.2f} x the speed of the full softmax ({full[1]:.2f} ms)")
    if cutoffs:
        print(f"--adaptive-softmax-cutoff {','.join(map(str, cutoffs))} --adaptive-softmax-factor {args.factor:g}")
    else:
        print("no --adaptive-softmax-cutoff: the full softmax is the fastest")
