#!/usr/bin/env python3
"""Converts a model folder of another library (config.json and weights) to OUT/checkpoint.pt and OUT/dict.txt."""

import os

import fairseq_adaptive.plugin  # noqa: F401  registers models
from fairseq_adaptive.command import run
from fairseq_adaptive.interop.checkpoint import require_new
from fairseq_adaptive.interop.conversion import FORMATS, find_format, write_folder
from fairseq_adaptive.ranges import Parser


def main():
    parser = Parser(description=__doc__, add_help=False)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="what the folder holds")
    parser.add_argument(
        "--input",
        required=True,
        metavar="FOLDER",
        help="config.json with model.safetensors or "
        "pytorch_model.bin; with --format albert_act also a checkpoint of fairseq, to go back",
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="the new folder; must not exist")
    chosen = Parser(add_help=False)
    chosen.add_argument("--format", choices=sorted(FORMATS))
    name = chosen.parse_known_args()[0].format
    if name:
        find_format(name).add_args(parser.add_argument_group(f"--format {name}"))
    parser.add_argument("-h", "--help", action="help", help="with --format, shows its flags, too")
    args = parser.parse_args()

    require_new(args.output)
    module = find_format(args.format)
    if os.path.isfile(args.input) and hasattr(module, "convert_back"):
        module.convert_back(args)
        print(f"wrote {args.output}")
        return
    state, dictionary = module.convert(args)
    write_folder(state, dictionary, args.output)
    print(f"wrote {args.output}/checkpoint.pt and {args.output}/dict.txt ({len(dictionary)} entries)")


if __name__ == "__main__":
    run(main)
