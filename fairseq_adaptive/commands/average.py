"""Averages the weights of checkpoints, also of models with shared parameters, into one that fairseq-generate takes."""

from fairseq_adaptive.ranges import COUNT, Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "--inputs",
        required=True,
        nargs="+",
        metavar="PATH",
        help="checkpoint files, or one --save-dir with one of the --num-... flags",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the new checkpoint; must not exist")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--num-epoch-checkpoints", type=COUNT, metavar="N", help="average the last N of checkpoint*.pt")
    number.add_argument(
        "--num-update-checkpoints",
        type=COUNT,
        metavar="N",
        help="average the last N of checkpoint_*_*.pt, which --save-interval-updates writes",
    )
    parser.add_argument("--checkpoint-upper-bound", type=COUNT, metavar="N", help="leave out later epochs or updates")
    args = parser.parse_args(argv)
    by = "update" if args.num_update_checkpoints is not None else "epoch"
    count = args.num_update_checkpoints if by == "update" else args.num_epoch_checkpoints
    paths = args.inputs
    if count is not None and len(paths) > 1:
        parser.error(f"--num-{by}-checkpoints takes one folder in --inputs, not {len(paths)} paths")
    if count is None and args.checkpoint_upper_bound is not None:
        parser.error("--checkpoint-upper-bound goes with --num-epoch-checkpoints or --num-update-checkpoints")

    from fairseq_adaptive.interop import average_checkpoints, last_checkpoints, require_new, save_checkpoint

    if count is not None:
        paths = last_checkpoints(paths[0], count, by, args.checkpoint_upper_bound)
    require_new(args.output)
    print("averaging", *paths)
    save_checkpoint(average_checkpoints(paths), args.output)
    print("wrote", args.output)
