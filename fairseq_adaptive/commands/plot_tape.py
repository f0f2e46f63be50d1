"""Shows which patches an adatape_vit reads, over all images and for each class, and how long its tapes are."""

import logging

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.printable import printable
from fairseq_adaptive.progress import progress
from fairseq_adaptive.ranges import BATCH, Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("data", help="the folder that the model was trained on")
    parser.add_argument("--path", required=True, metavar="CHECKPOINT")
    parser.add_argument("--gen-subset", default="test", metavar="SPLIT", help="train, valid or test (default)")
    parser.add_argument("--batch-size", type=BATCH, default=256)
    parser.add_argument(
        "--class-names",
        metavar="NAME,NAME,...",
        help="of the classes, in their order, where the data have numbers alone (Fashion-MNIST)",
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture; must not exist")
    args = parser.parse_args(argv)

    import torch

    import fairseq_adaptive.plugin  # noqa: F401  registers task and model
    from fairseq_adaptive.interop.checkpoint import load_model
    from fairseq_adaptive.report.pictures import require_picture
    from fairseq_adaptive.report.tape_map import plot_map, read_map

    logging.disable(logging.INFO)
    require_picture(args.output)
    model, task = load_model(args.path, {"data": args.data})
    if getattr(model, "bank_embedding", None) is None:
        raise UsageError(f"{args.path} is no adatape_vit with a bank of patches: there are no places to show")
    names = args.class_names.split(",") if args.class_names else task.classes
    if len(names) != len(task.classes):
        raise UsageError(f"--class-names has {len(names)} names for {len(task.classes)} classes")
    task.load_dataset(args.gen_subset)
    dataset = task.dataset(args.gen_subset)
    dataset.augment, dataset.mixup = None, 0
    batches = (
        dataset.collater([dataset[index] for index in range(start, min(start + args.batch_size, len(dataset)))])
        for start in progress(range(0, len(dataset), args.batch_size), "images")
    )
    counted = read_map(model.eval(), batches, len(task.classes))
    print(
        f"images {counted.rows.sum()}, accuracy {100 * counted.correct / counted.rows.sum():.2f}, "
        f"tape {counted.mean_length:.2f}, images/s {counted.rows.sum() / counted.seconds:.0f}"
    )
    for name, lengths, rows in zip(names, counted.lengths, counted.rows):
        shares = " ".join(f"{length}:{n / rows:.3f}" for length, n in enumerate(lengths.tolist()) if n)
        print(f"class {printable(name)}: {rows} images, tapes {shares}")
    grid = [side // model.bank_embedding.projection.kernel_size[0] for side in task.image_size]
    labels = [dataset.images.label(index) for index in range(len(dataset))]
    example = None
    if set(labels) == set(range(len(task.classes))):
        first = [labels.index(number) for number in range(len(task.classes))]
        example = torch.stack([dataset[index]["image"].float().mean(-1) for index in first])
    plot_map(counted, grid, args.output, names, example)
    print("wrote", args.output)
