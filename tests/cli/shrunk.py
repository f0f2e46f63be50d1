"""Runs a program that pages call small: widths, batches and updates of its flags are cut down, and data that is not there is
small data of its task. A program: ``shrunk.py NAME [flags]``, for example ``shrunk.py fairseq-train ...`` or
``shrunk.py python scripts/predict.py ...``; PAGE_DATA is the folder with the data of each task.
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import os
import re
import runpy
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
    "tape_mlp_dim": 16,
    "tape_ffn_embed_dim": 16,
    "adaptive_softmax_cutoff": "10,20",
    "adaptive_input_cutoff": "10,20",
    "batch_size": 4,
    "batch_size_valid": 4,
    "max_tokens": 256,
    "total_num_update": 4,
    "warmup_updates": 1,
    "tokens_per_sample": 16,
    "memory_length": 16,
    "architecture_warmup_updates": 0,
    "num_workers": 0,
    "log_interval": 1,
    "held_out": 8,
    "train_examples": 32,
    "eval_examples": 8,
}
SHAPES = ("embed_dim", "ffn_embed_dim", "attention_heads", "layers", "input_dim", "output_dim")  # those of a checkpoint
OF_LANGUAGE_MODELS = ("decoder_input_dim", "decoder_output_dim")  # elsewhere they are no flags
LEFT_OUT = ("--fp16", "--fp16-no-flatten-grads", "--amp")  # of a GPU
TASKS = {"segmented_language_modeling": "language_modeling"}
CRITERIONS = {"sentence_prediction": "sentence_prediction", "image_classification": "tape_ponder_loss"}
# what else a program is told, behind what it is told by the page; by subcommand, or by file
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmark"))
MORE = importlib.import_module("runs").SMALL | {
    "report": "--rounds 1 --texts 8 --device cpu",
    "dial": "--texts 8",
    "derive": "--batch-size 2 --tokens-per-sample 16",
    "derive_architecture.py": "--batch-size 2 --tokens-per-sample 16",
    "calibrate": "--tolerance 0.9 --confidence 0.5 --cpu",
    "optimal_cutoffs.py": "--tokens 32 --hidden-dim 16",
    "measure.py": "--seeds 1",
    "gallery.py": "--updates 2 --width 8 --rounds 1 --seeds 1",
    "sheets.py": "--train 16 --dev 4 --test 4 --trained 2 --deepest 2 --cells 8",
    "depth.py": "--width 8 --batch-size 8 --seeds 1",
    "calibration.py": "--resamples 2 --tolerance 0.9 --confidence 0.5 --grid 0.9,0.5",
    "fairseq-hydra-train": "common.cpu=true optimization.max_update=2 optimization.update_freq=[1] ++model.encoder_embed_dim=16 "
    "++model.encoder_ffn_embed_dim=32 ++model.decoder_embed_dim=16 ++model.decoder_ffn_embed_dim=32 dataset.num_workers=0 "
    "dataset.required_batch_size_multiple=1 dataset.max_tokens=256 distributed_training.distributed_world_size=1 "
    "common.fp16=false",
}
sys.path.pop(0)


@dataclasses.dataclass
class NoFields:
    """Of models whose flags are those of argparse."""


def value(words, flag, default=None):
    return words[words.index(flag) + 1] if flag in words else default


def task_of(command, words):
    return value(words, "--task", "language_modeling" if command == "fairseq-eval-lm" else "translation")


def with_data(command, words):
    """The words, with data for what is not there; ``DATA`` is whatever the task reads."""
    import small_data

    task = task_of(command, words)
    if not words or words[0].startswith("-"):
        return words
    kind = TASKS.get(task, task)
    kind += f":{value(words, '--num-classes', '2')}" if kind == "sentence_prediction" else ""
    if kind == "image_classification" and "--held-out" not in words:
        kind += ":valid"
    if words[0] == "DATA":
        return [str(small_data.kept(kind)), *words[1:]]
    if not os.path.lexists(words[0]):
        small_data.link(kind, words[0])
    return words


def shapes_of(words):
    """The sizes of the checkpoint that a training starts from."""
    path = value(words, "--restore-file") or value(words, "--finetune-from-model")
    if path is None or not Path(path).is_file():
        return {}
    import torch

    state = torch.load(path, weights_only=False)
    model = state["cfg"]["model"] if state.get("cfg") else state["args"]
    model = model if isinstance(model, dict) else vars(model)
    return {f"{side}_{name}": model.get(f"{side}_{name}") for side in ("encoder", "decoder") for name in SHAPES}


def smaller(command, words):
    """The flags to add."""
    from fairseq import options
    from fairseq.models import ARCH_MODEL_REGISTRY

    if command != "fairseq-train":
        added = ["--cpu", "--num-workers", "0", "--required-batch-size-multiple", "1"]
        return added + (with_criterion(command, words) if command == "fairseq-validate" else [])
    sys.argv = [command, *words]
    args = options.parse_args_and_arch(options.get_training_parser(), list(words))
    added = ["--cpu", "--required-batch-size-multiple", "1", "--max-update", "2", "--no-save-optimizer-state"]
    there = {name: size for name, size in shapes_of(words).items() if size is not None}
    fields = getattr(ARCH_MODEL_REGISTRY[args.arch], "__dataclass", None) or NoFields
    defaults = {field.name: field.default for field in dataclasses.fields(fields)}
    for name, most in (SMALL | there).items():
        given = getattr(args, name, defaults.get(name))
        if "_lm" not in args.arch and name in OF_LANGUAGE_MODELS:
            continue
        if given and (given != most if name in there else isinstance(most, str) or int(given) > most):
            added += [f"--{name.replace('_', '-')}", str(most)]
    if args.update_freq != [1]:
        added += ["--update-freq", "1"]
    if args.max_tokens is None and args.batch_size is None:
        added += ["--batch-size", "4"]
    if args.optimizer is None:
        added += ["--optimizer", "adam"]
    return added + with_criterion(command, words)


def with_criterion(command, words):
    known = "--criterion" not in words and CRITERIONS.get(task_of(command, words))
    return ["--criterion", known] if known else []


def without_peer(words):
    """Other people's code is not here."""
    place = words.index("--peer") if "--peer" in words else len(words)
    return words[:place] + words[place + 2 :]


def dial(main):
    """Turn a model to the page's share, or, where so small a model refuses it, to one of those that it names."""
    from fairseq_adaptive.errors import UsageError

    try:
        main()
    except UsageError as error:
        ends = re.search(r"spends ([\d.]+) to ([\d.]+) of", str(error))
        if ends is None:
            raise
        sys.argv += ["--compute", str(sum(map(float, ends.groups())) / 2)]
        main()


def start(name, words):
    """Become the program."""
    sys.argv = [name, *words]
    if name not in ("python", "python3"):
        (script,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        return dial(script.load()) if words[:1] == ["dial"] else script.load()()
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        return runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def end_epoch(folder, words):
    """Leave what the end of an epoch leaves, which so few updates do not reach."""
    last = folder / "checkpoint_last.pt"
    if "--no-epoch-checkpoints" not in words and last.exists() and not (folder / "checkpoint1.pt").exists():
        shutil.copy(last, folder / "checkpoint1.pt")


def once(words, train):
    """Train, unless it has been trained so but for numbers and folders of its own: then what that made is copied."""
    folder = value(words, "--save-dir", "checkpoints")
    if "--save-dir" not in words:
        shutil.rmtree(folder, ignore_errors=True)  # of the training before, which a user would keep
    kind = [word for before, word in zip(["", *words], words) if before not in ("--seed", "--save-dir")]
    kind = hashlib.sha256(re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", " ".join(kind)).encode()).hexdigest()[:12]
    shared = words[0].startswith(os.environ["PAGE_DATA"]) and not {"--restore-file", "--finetune-from-model"} & {*words}
    made = Path(os.environ["PAGE_DATA"] if shared else ".", ".trained", kind)  # with other pages
    if not made.exists():
        out = os.dup(1)
        made.parent.mkdir(exist_ok=True)
        with open(made.with_suffix(".log"), "wb") as log:
            os.dup2(log.fileno(), 1)
            try:
                train()
                end_epoch(Path(folder), words)
            finally:
                sys.stdout.flush()
                os.dup2(out, 1)
                sys.stdout.write(made.with_suffix(".log").read_text())
        made.unlink(missing_ok=True)
        made.symlink_to(os.path.abspath(folder))
        return
    sys.stdout.write(made.with_suffix(".log").read_text())
    if made.resolve() != Path(folder).resolve():
        shutil.copytree(made.resolve(), folder, dirs_exist_ok=True)


def main():
    sys.path.insert(0, str(Path(__file__).parent))
    if "fairseq_adaptive" in sys.modules:  # imported before there was this folder (page_server.py)
        sys.modules["fairseq_adaptive"].__path__.append(os.path.abspath("fairseq_adaptive"))
    name, *words = sys.argv[1:]
    words = [word for word in words if word not in LEFT_OUT]
    if name == "fairseq-preprocess":
        words += ["--workers", "1"]
    elif name.startswith("fairseq-") and name not in ("fairseq-adaptive", "fairseq-hydra-train", "fairseq-score"):
        words = with_data(name, words)
        words += smaller(name, words)
    else:
        key = name if name in MORE or not words else Path(words[0]).name
        words = without_peer(words) + MORE.get(key, "").split()
    sys.path.pop(0)
    if name == "fairseq-train":
        return once(words, lambda: start(name, words))
    start(name, words)


if __name__ == "__main__":
    main()
