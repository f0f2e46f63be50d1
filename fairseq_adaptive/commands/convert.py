"""Converts a model folder of another library (config.json and weights) to OUT/checkpoint.pt and OUT/dict.txt, or a plain
checkpoint of fairseq to one with shared layers."""

import os
from functools import partial

from fairseq_adaptive.ranges import Parser

# those of fairseq_adaptive.interop.conversion, which is not imported for --help
FORMATS = ("albert_act", "bert", "fairseq", "roberta", "transfo_xl", "transkimmer")


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__, add_help=False)
    parser.add_argument("--format", required=True, choices=FORMATS, help="what the folder holds")
    parser.add_argument(
        "--input",
        required=True,
        metavar="FOLDER",
        help="config.json with model.safetensors or "
        "pytorch_model.bin; with --format albert_act also a checkpoint of fairseq, to go back; with --format fairseq the "
        "checkpoint of a transformer, transformer_lm or roberta",
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="the new folder; must not exist")
    chosen = Parser(prog=prog, add_help=False)
    chosen.add_argument("--format", choices=FORMATS)
    name = chosen.parse_known_args(argv)[0].format
    if name:
        from fairseq_adaptive.interop.conversion import find_format

        find_format(name).add_args(parser.add_argument_group(f"--format {name}"))
    parser.add_argument("-h", "--help", action="help", help="with --format, shows its flags, too")
    args = parser.parse_args(argv)

    import fairseq_adaptive.plugin  # noqa: F401  registers models
    from fairseq_adaptive.files import require_new
    from fairseq_adaptive.interop.conversion import write_folder

    require_new(args.output)
    module = find_format(args.format)
    if os.path.isfile(args.input) and hasattr(module, "convert_back"):
        module.convert_back(args)
        print(f"wrote {args.output}")
        return
    if hasattr(module, "write"):
        print(module.write(args))
        return
    state, dictionary = module.convert(args)
    write_folder(state, dictionary, args.output, partial(module.outputs, args))
    print(f"wrote {args.output}/checkpoint.pt and {args.output}/dict.txt ({len(dictionary)} entries)")
