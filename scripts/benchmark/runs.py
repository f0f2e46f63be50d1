"""Which benchmarks all.py runs, what each of them needs, and how small they can be made."""

import importlib.util
import string
from typing import Dict, List, NamedTuple, Optional, Tuple

# what shows that a script runs: behind other flags
_TINY = "--rounds 1 --embed-dim 16 --ffn-embed-dim 32 --attention-heads 2"
SMALL = {
    "adaptive_softmax.py": "--rounds 1 --vocab-size 200 --cutoffs 10,50 --hidden-dim 16 --tokens 32",
    "checkpoints.py": "--rounds 1 --batch-size 4",
    "classification.py": "--rounds 1 --timed-texts 4 --batch-sizes 4 32",
    "decoding.py": "--rounds 1 --marian-updates 2 --sentences 8 --batch-sizes 4 --max-len-b 10",
    "halting.py": "--rounds 1 --layers 2 --tokens 8 --batch-sizes 2",
    "int8.py": "--rounds 1 --batch-sizes 2",
    "kernels.py": "--small --rounds 1",
    "packing.py": "--rounds 1 --lengths 8 --batch 2 --kept 0.5",
    "relative_attention.py": "--rounds 1 --length 8 --memory 8 --embed-dim 16 --heads 2 --head-dim 8 --batch-size 2 "
    "--eval-lengths 1 --eval-memory 8",
    "self_speculative.py": "--rounds 1 --sentences 8 --batch-sizes 4",
    "single_token.py": f"{_TINY} --pairs 4 --memory 8 --batch-sizes 1 --steps 2",
    "skimming.py": "--rounds 1 --lengths 8 --batch-sizes 2 --kept 0.5",
    "tape.py": "--arch adatape_vit_mini --image-size 28 --batch-size 2 --rounds 1",
    "time_shares.py": f"{_TINY} --layers 2 --unique-layers 1 --tokens 64 --length 8 --vocab-size 50 "
    "--models shared_transformer shared_transformer_lm",
    "token_merging.py": "--arch token_merging_vit_mini --r 2 --image-size 28 --batch-size 2 --rounds 1",
    "training.py": f"{_TINY} --updates 1 --layers 2 --unique-layers 1 --max-tokens 256",
    "transformer_xl.py": "--rounds 1 --vocab-size 200 --cutoffs 10,50 --layers 1 --embed-dim 16 --heads 2 "
    "--ffn-embed-dim 32 --length 8 --memory 8 --batch-size 2",
}
# what all.py is told where it is: flags of all.py, without dashes
NEEDS = {
    "translation_data": "folder of fairseq-preprocess with a joined dictionary and a test set",
    "translation_checkpoint": "of a shared_transformer that was trained on it",
    "self_speculative_checkpoint": "of one trained with early_exit_loss, for instance",
    "texts_data": "folder of a task of classification",
    "texts_checkpoints": "checkpoints that were trained on it, the dense one first",
    "texts_models": "the same for classification.py, each as NAME=CHECKPOINT[,CHECKPOINT...]",
    "transformer_xl": "a checkout of kimiyoung/transformer-xl, a peer",
    "albert_act": "a checkout of AntoineSimoulin/adaptive-depth-transformers, a peer",
}
SEVERAL = ("texts_checkpoints", "texts_models")


class Run(NamedTuple):
    """A call of a script.

    Args:
        name: of what it finds; the script's, or the script's and the peer's
        script: a file of this folder
        flags: with what all.py is told, in braces
        peer: more flags, where all.py is told what they name
        module: that must be installed
        output: the flag that names the JSON file
    """

    name: str
    script: str
    flags: str = ""
    peer: str = ""
    module: Optional[str] = None
    output: str = "--json"


_KEPT = "--kept 0.2 0.5 1.0 --rounds 5"
_SHORT = f"--lengths 25 128 {_KEPT}"
RUNS = (
    Run("halting", "halting.py", peer="--peer {albert_act}"),
    Run("skimming", "skimming.py", f"--lengths 25 128 512 {_KEPT}"),
    Run("skimming-dense", "skimming.py", f"--against dense {_SHORT}"),
    Run("skimming-huggingface", "skimming.py", f"--against huggingface {_SHORT}", module="transformers"),
    Run("skimming-onnxruntime", "skimming.py", f"--against onnxruntime {_SHORT}", module="onnxruntime"),
    Run("skimming-onnxruntime-int8", "skimming.py", f"--against onnxruntime-int8 {_SHORT}", module="onnxruntime"),
    Run("skimming-int8", "skimming.py", f"--int8 --against onnxruntime-int8 {_SHORT}", module="onnxruntime"),
    Run("packing", "packing.py"),
    Run("tape", "tape.py"),
    Run("token-merging", "token_merging.py"),
    Run("relative-attention", "relative_attention.py", peer="--peer {transformer_xl}"),
    Run("adaptive-softmax", "adaptive_softmax.py", peer="--peer {transformer_xl}"),
    Run("transformer-xl", "transformer_xl.py", "--peer {transformer_xl}"),
    Run("single-token", "single_token.py"),
    Run("int8", "int8.py"),
    Run("kernels", "kernels.py", "--device cpu --types fp32 --no-compile", output="--output"),
    Run("time-shares", "time_shares.py", "--threads {threads}"),
    Run("training", "training.py", "{translation_data}"),
    Run("decoding", "decoding.py", "{translation_data} {translation_checkpoint}"),
    Run(
        "self-speculative",
        "self_speculative.py",
        "{translation_data} {self_speculative_checkpoint} --sentences 192 --rounds 3",
    ),
    Run("checkpoints", "checkpoints.py", "{texts_data} {texts_checkpoints}"),
    Run("classification", "classification.py", "{texts_data} {texts_models}"),
)


def _filled(flags: str, told: Dict[str, Optional[List[str]]]) -> Tuple[List[str], List[str]]:
    """The words of flags with what all.py is told, and the names of what it is not."""
    words, missing = [], []
    for word in flags.split():
        names = [name for _, name, _, _ in string.Formatter().parse(word) if name]
        missing += [name for name in names if not told.get(name)]
        words += told.get(names[0]) or [] if names else [word]
    return words, missing


def command(run: Run, told: Dict[str, Optional[List[str]]], small: bool) -> Tuple[List[str], str]:
    """Return the words behind the script, and what is left out and why; no words where all of it is.

    Args:
        run: one of :data:`RUNS`
        told: the words for each name in braces
        small: as small as can be
    """
    if run.module is not None and importlib.util.find_spec(run.module) is None:
        return [], f"{run.module} is not installed"
    words, missing = _filled(run.flags, told)
    if missing:
        return [], "there is no " + " and no ".join(f"--{name.replace('_', '-')}" for name in missing)
    peer, missing = _filled(run.peer, told)
    why = "; ".join(f"without that peer, since there is no --{name.replace('_', '-')}" for name in missing)
    words += [] if missing else peer
    return [run.script, *words, *(SMALL[run.script].split() if small else [])], why
