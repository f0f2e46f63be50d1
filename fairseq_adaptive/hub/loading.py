"""``from_pretrained``: which class of the hub reads what there is."""

import importlib
import os

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.hub import zoo
from fairseq_adaptive.hub.folder import CONFIG, MARK, has_fairseq, needs_fairseq, read_config

TASKS = {
    "sentence_prediction": ("hub.classifier", "TranskimmerClassifier"),
    "question_answering": ("hub.reader", "TranskimmerReader"),
    "translation": ("hub.generating", "Translator"),
    "language_modeling": ("hub.generating", "LanguageModel"),
    "segmented_language_modeling": ("hub.generating", "LanguageModel"),
    "masked_lm": ("hub.masked_words", "MaskedLanguageModel"),
    "masked_lm_sop": ("hub.masked_words", "MaskedLanguageModel"),
    "image_classification": ("hub.tapes", "ImageClassifier"),
    "parity": ("hub.tapes", "ParityModel"),
}
PATTERNS = ["*.json", "*.bin", "*.safetensors", "*.model", "*.txt", "codes"]


def from_pretrained(source, **options):
    """A trained model.

    Args:
        source: a checkpoint of fairseq, a folder of ``save_pretrained`` or of a published ALBERT-ACT, the name of such a
            folder on the Hugging Face hub, OWNER/NAME, or a name of the zoo (:mod:`fairseq_adaptive.hub.zoo`)
        options: of the class that reads it, such as ``data``, ``tokenizer``, ``device``, ``int8``

    Returns:
        an object of the class that its task has in :mod:`fairseq_adaptive.hub`

    Raises:
        UsageError: where there is no model, or none that the hub reads; without fairseq, by name for what needs it
    """
    if os.path.isfile(source) or os.fspath(source).endswith(".pt"):
        needs_fairseq(f"the checkpoint {os.fspath(source)}")
        from fairseq_adaptive.interop.checkpoint import load_checkpoint

        task = load_checkpoint(source)["cfg"]["task"]
        task = task.get("_name") if isinstance(task, dict) else getattr(task, "_name", None)
        return _class_of(str(task), source).from_pretrained(source, **options)
    folder = local_folder(source)
    config = read_json(os.path.join(folder, CONFIG)) if os.path.isfile(os.path.join(folder, CONFIG)) else None
    if config is not None and MARK not in config:
        if config.get("model_type") == "albert_act" or "act_epsilon" in config:
            needs_fairseq(f"the published ALBERT-ACT in {folder}")
            from fairseq_adaptive.hub.albert_act import AlbertActModel

            return AlbertActModel.from_pretrained(folder, **options)
        kind = str(config.get("model_type"))
        raise UsageError(
            f"config.json in {folder} is that of another library's model ({kind[:40]}): make a checkpoint of it with "
            "fairseq-adaptive convert"
        )
    return _class_of(read_config(folder)["task"], folder).from_pretrained(folder, **options)


def _class_of(task: str, source):
    if task not in TASKS:
        raise UsageError(
            f"{os.fspath(source)} was trained with --task {task}: the hub reads models of {', '.join(TASKS)}"
        )
    module, name = TASKS[task]
    if not has_fairseq() and name != "TranskimmerClassifier":
        from fairseq_adaptive.hub.encoder import Encoder

        return Encoder
    return getattr(importlib.import_module(f"fairseq_adaptive.{module}"), name)


def located(source) -> str:
    """A checkpoint file as it is, else :func:`local_folder`."""
    if os.path.isfile(source) or os.fspath(source).endswith(".pt"):
        return os.fspath(source)
    return local_folder(source)


def local_folder(name) -> str:
    """A folder, or the one that the zoo, or the Hugging Face hub, has under a name.

    Raises:
        UsageError: where there is none
    """
    if os.path.isdir(name):
        return os.fspath(name)
    if zoo.is_name(name):
        return zoo.local_model(os.fspath(name))
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            f"there is no folder {name}; to load it from the Hugging Face hub by this name: pip install "
            "'fairseq_adaptive[hf]'"
        ) from None
    try:
        return snapshot_download(name, allow_patterns=PATTERNS)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} is no folder, and does not come from the Hugging Face hub: {reason}") from error


def trained_state(path, source, *tasks: str):
    """What is in a checkpoint of one of some tasks.

    Args:
        path: its file
        source: what the user named

    Raises:
        UsageError: where it was trained with another task
    """
    from fairseq_adaptive.interop.checkpoint import load_checkpoint

    state = load_checkpoint(path)
    name = str(state["cfg"]["task"]["_name"])
    if name not in tasks:
        raise UsageError(f"{source} was trained with --task {name}, not {' or '.join(tasks)}")
    return state


def default_device(int8: bool = False) -> str:
    """A GPU if there is one; int8 runs on a CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() and not int8 else "cpu"
