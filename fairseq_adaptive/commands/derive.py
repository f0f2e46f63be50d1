"""Prints the layout that a search has found, as a flag for training, and what it costs beside a Transformer-XL."""

from fairseq_adaptive.ranges import BATCH, POSITIONS, POSITIVE, Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("checkpoint", help="of a training of --arch par_supernet")
    parser.add_argument(
        "--batch-size", type=BATCH, default=8, metavar="N", help="rows of the measured step (default: 8)"
    )
    parser.add_argument(
        "--tokens-per-sample", type=POSITIONS, default=128, metavar="N", help="length of its segments (default: 128)"
    )
    parser.add_argument(
        "--compute",
        type=POSITIVE,
        metavar="X",
        help="choose the most probable blocks that cost this share of a Transformer-XL of as many blocks, within 3%% "
        "(default: the most probable kind of each block)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tensorboard", metavar="DIR", help="--tensorboard-logdir of that training, for the pictures")
    source.add_argument("--log", metavar="FILE", help="log of that training, where it has no such folder")
    parser.add_argument("--plot", metavar="PNG", help="draw the probabilities of all blocks over the training")
    parser.add_argument("--animation", metavar="GIF", help="the same as an animation")
    args = parser.parse_args(argv)
    if bool(args.tensorboard or args.log) != bool(args.plot or args.animation):
        parser.error("--plot and --animation are drawn from --tensorboard or --log: give both")

    import torch

    import fairseq_adaptive.plugin  # noqa: F401  safe loading
    from fairseq_adaptive.report.architecture import (
        blocks_within,
        compare_compute,
        found_blocks,
        found_layout,
        kind_costs,
        load_search,
    )
    from fairseq_adaptive.report.pictures import require_animation, require_picture
    from fairseq_adaptive.report.search_map import animate_course, plot_course, read_probabilities, read_scalars

    if args.plot:
        require_picture(args.plot)
    if args.animation:
        require_animation(args.animation)
    probabilities, options = load_search(args.checkpoint)
    course = read_scalars(args.tensorboard) if args.tensorboard else read_probabilities(args.log) if args.log else None
    blocks = found_blocks(probabilities)
    if args.compute is not None:
        costs = kind_costs(options, args.batch_size, args.tokens_per_sample)
        blocks = blocks_within(probabilities, costs, args.compute)
    layout = found_layout(blocks)
    print("block  attention  feed-forward  identity")
    for number, (row, kind) in enumerate(zip(probabilities.tolist(), blocks, strict=True)):
        print(f"{number:5}  {row[0]:9.3f}  {row[1]:12.3f}  {row[2]:8.3f}  {kind}")
    attention, half = blocks.count("a"), -(-len(blocks) // 2)
    print(f"attention blocks: {attention}; {half} in a Transformer-XL of {len(blocks)} blocks")
    torch.manual_seed(1)
    compute = compare_compute(options, blocks, args.batch_size, args.tokens_per_sample)
    print(
        f"forward and backward of its blocks, {args.batch_size} x {args.tokens_per_sample} tokens, memory "
        f"{options.memory_length}, {torch.get_num_threads()} threads:"
    )
    for name, unit, scale in ("flops", "GFLOPs", 1e9), ("seconds", "ms", 1e-3):
        found, full = (value / scale for value in compute[name])
        print(f"  {found:.2f} {unit}, {found / full:.2f} of the Transformer-XL's {full:.2f}")
    if args.plot:
        plot_course(course, args.plot)
    if args.animation:
        animate_course(course, args.animation)
    print(f"--layout {layout}")
