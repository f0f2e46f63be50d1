#!/usr/bin/env python3
"""Accuracy against measured time: fine-tuned classifiers, skimming ones beside the dense ones they come from.

Accuracy and FLOPs are those of all texts of a subset; checkpoints of one name, such as three seeds, are averaged. Time
is that of batches of texts in their order, forward passes alone, each model and its peers in turn on the same batches:
the first name's first checkpoint (no padding is computed, as in ours always), and stock fairseq's RoBERTa of the same
shape with random weights (padding is computed). The table can be drawn later from the JSON file.
"""

import argparse
import json
import platform
import statistics
from datetime import date

import common
import torch
from fairseq import checkpoint_utils
from fairseq.models.roberta import RobertaModel
from record import CLOCKS, add_json, in_turn, median, ratios

from fairseq_adaptive.command import run
from fairseq_adaptive.files import require_new, whole_file
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.stack.compute import stack_macs
from fairseq_adaptive.ranges import BATCH, COUNT, ROUNDS, Parser

STACK = "encoder.sentence_encoder.layers"


class Classifier:
    """A checkpoint as it is used in inference."""

    def __init__(self, path, data):
        models, cfg, self.task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": data})
        self.model, self.cfg = models[0].eval(), cfg
        self.model.make_generation_fast_()

    def __call__(self, batch):
        scores, _ = self.model(
            batch["net_input"]["src_tokens"],
            features_only=True,
            classification_head_name="sentence_classification_head",
        )
        return scores


class Stock(Classifier):
    """fairseq's RoBERTa of the shape of another model."""

    def __init__(self, like):
        args = argparse.Namespace(**{**vars(like.model.args), "max_positions": like.model.max_positions()})
        self.model = RobertaModel.build_model(args, like.task).eval()
        self.model.register_classification_head("sentence_classification_head", like.task.cfg.num_classes)
        self.model.make_generation_fast_()


def batches(dataset, size, texts):
    """Batches of ``texts`` texts, evenly spread over the subset; None: all."""
    places = range(len(dataset))
    if texts and texts < len(dataset):
        places = [number * len(dataset) // texts for number in range(texts)]
    places = list(places)
    return [
        dataset.collater([dataset[place] for place in places[start : start + size]])
        for start in range(0, len(places), size)
    ]


@torch.no_grad()
@constant_weights()  # as fairseq-validate and predict do
def evaluate(classifier, some):
    """Share of right labels, and multiply-adds of the dense model as a multiple of those that were spent."""
    right = texts = spent = dense = 0
    layers = classifier.model.encoder.sentence_encoder.layers
    for batch in some:
        with recording(classifier.model) as traces:
            scores = classifier(batch)
        right += int((scores.argmax(-1) == batch["target"].view(-1)).sum())
        texts += len(scores)
        for trace in traces.get(STACK, []):
            macs = stack_macs(layers, trace)
            spent, dense = spent + float(macs[0]), dense + float(macs[1])
    return right / texts, dense / spent if spent else 1.0


@torch.no_grad()
@constant_weights()
def seconds(classifiers, some, rounds):
    """For each classifier, by its name, the seconds of every round, all in turn."""
    ways = {name: lambda each=each: [each(batch) for batch in some] for name, each in classifiers.items()}
    return in_turn(ways, rounds, warm=1)


def measure(args, groups, record):
    peers, rows = None, []
    for name, paths in groups:
        scores, speed = [], {}
        for place, path in enumerate(paths):
            classifier = Classifier(path, args.data)
            classifier.task.load_dataset(args.subset)
            dataset = classifier.task.dataset(args.subset)
            scores.append(evaluate(classifier, batches(dataset, 32, args.texts)))
            if place >= args.timed_checkpoints:
                continue
            if peers is None:
                peers = {"the dense one": classifier, "stock fairseq": Stock(classifier)}
            for size in args.batch_sizes:
                some = batches(dataset, size, args.timed_texts)
                times = seconds({**peers, name: classifier}, some, args.rounds)
                count = sum(len(batch["id"]) for batch in some)
                record.add(f"{count} texts, batch {size}, {path}", times, "stock fairseq", texts=count)
                faster = [statistics.median(ratios(times[peer], times[name], args.clock)) for peer in peers]
                speed.setdefault(size, []).append((*faster, count / median(times[name], args.clock)))
        rows.append(
            {
                "name": name,
                "checkpoints": len(paths),
                "accuracies": [round(100 * right, 2) for right, _ in scores],
                "accuracy": 100 * statistics.mean(right for right, _ in scores),
                "flops_speedup": statistics.mean(flops for _, flops in scores),
                "speed": {
                    size: dict(
                        zip(("against_dense", "against_stock", "texts_per_second"), map(statistics.mean, zip(*some)))
                    )
                    for size, some in speed.items()
                },
            }
        )
        print(row_text(rows[-1], args.batch_sizes), flush=True)
    return rows


def row_text(row, sizes):
    speed = (f"{row['speed'][size]['against_dense']:.2f} | {row['speed'][size]['against_stock']:.2f}" for size in sizes)
    each = ", ".join(f"{accuracy:.1f}" for accuracy in row["accuracies"])
    return f"| {row['name']} | {row['accuracy']:.2f} ({each}) | {row['flops_speedup']:.2f} | {' | '.join(speed)} |"


def group(text):
    name, _, paths = text.partition("=")
    if not paths:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=CHECKPOINT or NAME=CHECKPOINT,CHECKPOINT")
    return name, paths.split(",")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", help="the bin folder of prepare.sh")
    parser.add_argument(
        "models", nargs="+", type=group, metavar="NAME=CHECKPOINT[,CHECKPOINT...]", help="the dense model first"
    )
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--batch-sizes", type=BATCH, nargs="+", default=[32])
    parser.add_argument("--texts", type=COUNT, help="evaluate this many texts of the subset (default: all)")
    parser.add_argument("--timed-texts", type=COUNT, default=512, help="time this many of them")
    parser.add_argument("--timed-checkpoints", type=COUNT, default=1, help="time this many checkpoints of a name")
    parser.add_argument("--rounds", type=ROUNDS, default=5, help="how often all are timed in turn")
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=CLOCKS[1],
        default=CLOCKS[0],
        help="seconds of the processor, where others use it too",
    )
    parser.add_argument("--output", metavar="JSON", help="write what was measured there; must not exist")
    add_json(parser)
    args = parser.parse_args()
    if args.output:
        require_new(args.output)
    record = common.describe(args)
    columns = "".join(f" against dense, batch {size} | against stock |" for size in args.batch_sizes)
    print(f"| model | accuracy | FLOPs speed-up |{columns}\n|---|---|---|{'---|---|' * len(args.batch_sizes)}")
    rows = measure(args, args.models, record)
    record.write()
    if args.output:
        about = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "subset": args.subset,
            "clock": "wall" if args.clock == CLOCKS[0] else args.clock,
            "rounds": args.rounds,
        }
        with whole_file(args.output) as part, open(part, "w", encoding="utf-8") as file:
            json.dump({**about, "models": rows}, file, indent=1)
        print("wrote", args.output)


if __name__ == "__main__":
    run(main)
