"""Runs a command of fairseq small: the widths, batches and updates of its flags are cut down, and data that is not there is
tiny data of its task. A program: ``shrunk.py COMMAND [flags]``; PAGE_DATA is the folder with the data of each task.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path

SMALL = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "encoder_input_dim": 16,
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_input_dim": 16,
    "decoder_output_dim": 16,
    "adaptive_softmax_cutoff": "10,20",
    "adaptive_input_cutoff": "10,20",
    "batch_size": 4,
    "max_tokens": 256,
    "total_num_update": 4,
    "warmup_updates": 1,
    "tokens_per_sample": 16,
    "memory_length": 16,
    "architecture_warmup_updates": 0,
    "num_workers": 0,
}
OF_LANGUAGE_MODELS = ("decoder_input_dim", "decoder_output_dim")  # elsewhere they are no flags
LEFT_OUT = ("--fp16", "--fp16-no-flatten-grads", "--amp")  # of a GPU
TASKS = {"segmented_language_modeling": "language_modeling"}


def value(words, flag, default):
    return words[words.index(flag) + 1] if flag in words else default


def link_data(command, words):
    if command == "fairseq-train" and "--save-dir" not in words:
        shutil.rmtree("checkpoints", ignore_errors=True)  # of the training before, which a user would keep
    task = value(words, "--task", "language_modeling" if command == "fairseq-eval-lm" else "translation")
    data = Path(os.environ["PAGE_DATA"], TASKS.get(task, task))
    if words and not words[0].startswith("-") and not Path(words[0]).exists():
        Path(words[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(words[0]).symlink_to(data)


def smaller(command, words):
    """The flags to add."""
    from fairseq import options

    if command != "fairseq-train":
        return ["--cpu", "--num-workers", "0", "--required-batch-size-multiple", "1"]
    sys.argv = [command, *words]
    args = options.parse_args_and_arch(options.get_training_parser(), list(words))
    added = ["--cpu", "--required-batch-size-multiple", "1", "--max-update", "2"]
    for name, most in SMALL.items():
        given = getattr(args, name, None)
        if "_lm" not in args.arch and name in OF_LANGUAGE_MODELS:
            continue
        if given and (isinstance(most, str) or int(given) > most):
            added += [f"--{name.replace('_', '-')}", str(most)]
    if args.max_tokens is None and args.batch_size is None:
        added += ["--batch-size", "4"]
    if args.optimizer is None:
        added += ["--optimizer", "adam"]
    return added


def main():
    command, *words = sys.argv[1:]
    words = [word for word in words if word not in LEFT_OUT]
    if command != "fairseq-preprocess":
        link_data(command, words)
        words += smaller(command, words)
    sys.argv = [command, *words]
    module = command.removeprefix("fairseq-").replace("-", "_")
    importlib.import_module(f"fairseq_cli.{module}").cli_main()


if __name__ == "__main__":
    main()
