"""Answers the questions of a file in the format of SQuAD and, where it has answers, says how well.

Writes predictions.json and nbest_predictions.json, for version 2 also null_odds.json, in the official format, to a new
folder.
"""

import json
import logging
import os

from fairseq_adaptive.files import require_new, whole_folder
from fairseq_adaptive.progress import progress
from fairseq_adaptive.ranges import BATCH, NUMBER, Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("questions", help="JSON in the format of SQuAD v1.1 or v2.0")
    parser.add_argument("--path", required=True, metavar="FILE", help="checkpoint of --task question_answering")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--data", metavar="FOLDER", help="with dict.txt and the vocabulary (default: as in training)")
    parser.add_argument("--null-threshold", type=NUMBER, help="(default: as in training)")
    parser.add_argument("--batch-size", type=BATCH, default=32)
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--int8", action="store_true", help="run the maps of the layers in int8, on the CPU")
    args = parser.parse_args(argv)

    import torch

    from fairseq_adaptive.hub import TranskimmerReader
    from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights

    # isort: split
    from fairseq import utils

    logging.disable(logging.INFO)
    require_new(args.output)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu and not args.int8 else "cpu")
    reader = TranskimmerReader.from_pretrained(
        args.path, args.data, null_threshold=args.null_threshold, device=device, int8=args.int8
    )
    task, model = reader.task, reader.model
    data = task.load_file("test", args.questions)
    order = data.ordered_indices().tolist()
    with torch.no_grad(), constant_weights():
        for first in progress(range(0, len(order), args.batch_size), "questions"):
            sample = data.collater(order[first : first + args.batch_size])
            sample = utils.move_to_cuda(sample) if device.type == "cuda" else sample
            task.collect(sample, model(**sample["net_input"], spans=True)[0])
    answers, lists, odds = task.answers("test")
    with whole_folder(args.output) as made:
        files = {"predictions": answers, "nbest_predictions": lists, **({"null_odds": odds} if odds else {})}
        for name, content in files.items():
            with open(os.path.join(made, f"{name}.json"), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, ensure_ascii=False)
    if task.has_answers("test"):
        print(json.dumps(task.evaluate("test"), indent=1))
    print(f"wrote {args.output}/predictions.json ({len(answers)} questions)")
