"""Writes a model with shared layers as a plain fairseq Transformer or a CTranslate2 model, of the shared size; or a classifier
or the encoder of a translation model as ONNX, whose policies are masks there.
"""

from fairseq_adaptive.ranges import Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("checkpoint", help="of training, or averaged")
    parser.add_argument("--to", required=True, choices=("fairseq", "ctranslate2", "onnx"))
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="the new checkpoint or ONNX file, or CTranslate2 folder; must not exist",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DATA_BIN",
        help="for ctranslate2 and onnx: the folder with the dictionaries (onnx: that of the training by default)",
    )
    parser.add_argument(
        "--counterpart", action="store_true", help="for onnx: without routers, halting rules and readers, at full depth"
    )
    parser.add_argument("--source-lang", help="for ctranslate2: where DATA_BIN has dictionaries only")
    parser.add_argument("--target-lang", help="for ctranslate2: where DATA_BIN has dictionaries only")
    args = parser.parse_args(argv)
    if args.counterpart and args.to != "onnx":
        parser.error(f"--counterpart is for --to onnx: --to {args.to} refuses models with policies")
    if args.to == "ctranslate2" and not args.data_dir:
        parser.error("--to ctranslate2 needs --data-dir, the folder with the dictionaries")

    import fairseq_adaptive.plugin  # noqa: F401  safe loading
    from fairseq_adaptive.interop import (
        convert_to_ctranslate2,
        load_checkpoint,
        require_new,
        unroll_checkpoint,
        write_plain,
    )

    require_new(args.output)
    if args.to == "onnx":
        from fairseq_adaptive import hub

        model = hub.from_pretrained(args.checkpoint, device="cpu", **({"data": args.data_dir} if args.data_dir else {}))
        model.export_onnx(args.output, args.counterpart)
        print("wrote", args.output)
        return
    state = unroll_checkpoint(load_checkpoint(args.checkpoint))
    if args.to == "ctranslate2":
        convert_to_ctranslate2(state, args.data_dir, args.output, args.source_lang, args.target_lang)
    else:
        write_plain(state, args.output)
    print("wrote", args.output)
