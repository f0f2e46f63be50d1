"""Hostile checkpoints, and what watches a reader of them: for the tests of this folder."""

import argparse
import contextlib
import copy
import functools
import os
import sys

import torch
from fairseq import checkpoint_utils, models
from fairseq.data.legacy.masked_lm_dictionary import MaskedLMDictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, FairseqTask

CODE = "[__import__('os').system('touch PWNED')]"  # also the name of a file in the working directory
SECRET = "s3cret-of-the-environment"

_seen = _canary = None


def _watch(event, args):
    if _seen is None:
        return
    named = event == "open" and isinstance(args[0], (str, bytes, os.PathLike))
    if named and os.path.abspath(os.fsdecode(args[0])) == _canary:
        _seen.append(f"opened {args[0]}")
    elif event == "exec" and "__import__" in args[0].co_names or event in ("os.system", "subprocess.Popen", "os.exec"):
        _seen.append(f"{event} {args[0]}")
        raise PermissionError("caught")


sys.addaudithook(_watch)  # stays until the interpreter ends, and costs nothing while _seen is None


@contextlib.contextmanager
def watching():
    """Yield a list of what ran, and which file of the name :data:`CODE` was opened."""
    global _seen, _canary
    _canary, seen = os.path.abspath(CODE), []
    _seen = seen
    try:
        yield seen
    finally:
        _seen = None


SMALL = {"embed_dim": 16, "ffn_embed_dim": 8, "layers": 1, "attention_heads": 2, "unique_layers": 1, "hidden_size": 8}
SIZES = {
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SMALL.items()},
    "decoder_input_dim": 16,
    "decoder_output_dim": 16,
    "decoder_out_embed_dim": 16,
    "decoder_head_dim": 8,
    "layout": "aa",
    "blocks": 1,
    "embed_dim": 16,
    "num_layers": 1,
    "max_source_positions": 32,
    "tokens_per_sample": 32,
    "max_target_positions": 32,
    "max_positions": 32,
    "adaptive_softmax_cutoff": "4,8",
    "adaptive_input_cutoff": "4,8",
    "encoder_kernel_size_list": [3],
    "decoder_kernel_size_list": [3],
    "adaptive_softmax_factor": 4,
    "adaptive_input_factor": 4,
    "tape_tokens": 2,
    "tape_threshold": 1,
    "tape_layer": 0,
    "patch_size": 4,
    "tape_bank_patch_size": 2,
    "quant_noise_pq": 0.0,
    # of speech models
    "conv_feature_layers": "[(16, 3, 2)]",
    "conv_aggregator_layers": "[(16, 3, 1)]",
    "conv_pos": 4,
    "final_dim": 8,
    "conv_pos_groups": 2,
    "conv_out_channels": 16,
    "conv_channels": 16,
    "label_rate_ratios": [1],
    "prenet_dim": 8,
    "postnet_conv_dim": 8,
    "input_feat_per_channel": 8,
    "output_frame_dim": 8,
    "encoder_lstm_units": 8,
    "decoder_lstm_dim": 8,
    "encoder_conv_dim": 8,
    "w2v_path": "other.pt",
    "multires_hubert_path": "other.pt",
    "pretrained_xlm_checkpoint": "checkpoint.pt",
}
CONVOLUTIONS = {"encoder_layers": "[(8, 3)] * 1", "decoder_layers": "[(8, 3)] * 1", "decoder_attention": "True"}
# what the command line gives beside the flags of a model, and what speech models find in their data
GENERAL = {
    "criterion": "cross_entropy",
    "fp16": False,
    "bf16": False,
    "tpu": False,
    "cpu": True,
    "data": "data",
    "model_parallel_size": 1,
    "input_feat_per_channel": 8,
    "input_channels": 1,
    "speaker_to_id": None,
    "n_frames_per_step": 1,
    "target_speaker_embed": False,
    "source_lang": "x",
    "target_lang": "y",
    "lang_pairs": ["x-y"],
    "max_source_positions": 32,
    "max_target_positions": 32,
    "tokens_per_sample": 32,
    "target_code_size": 8,
    "output_frame_dim": 8,
    "target_is_code": True,
    "w2v_args": None,
    "w2v_path": "other.pt",
    "pitch_min": 0,
    "pitch_max": 1,
    "energy_min": 0,
    "energy_max": 1,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
    "vocoder": None,
    "adaptive_softmax_factor": 4,
    "left_pad_source": True,
    "left_pad_target": False,
    "encoder_langtok": None,
    "decoder_langtok": False,
    "discrete_duration": False,
    "discrete_f0": False,
}
TASK = {
    "_name": "translation",
    "data": "data",
    "tokens_per_sample": 32,
    "max_target_positions": 32,
    "labels": "x",
    "max_source_positions": 32,
    "sample_rate": 16000,
    "normalize": False,
    "add_bos_token": False,
    "autoregressive": True,
    "discrete_duration": False,
    "discrete_f0": False,
    "fine_tuning": False,
    "label_rate": -1,
    "label_rate_ratios": [1],
    "output_dictionary_size": -1,
    "filter_f0": False,
    "multi_corpus_keys": None,
}


def dictionary():
    made = MaskedLMDictionary()
    for word in "abcdefgh":
        made.add_symbol(word, 9)
    made.add_symbol("<mask>")
    return made


class AnyTask(FairseqTask):
    """What models ask a task for when they are built."""

    source_dictionary = target_dictionary = src_dict = tgt_dict = output_dictionary = dictionary = dictionary()
    target_duration_dictionary = target_f0_dictionary = dictionary
    dictionaries, dicts, langs = [dictionary], {"x": dictionary, "y": dictionary}, ["x", "y"]
    lang_pairs = model_lang_pairs = ["x-y"]
    source_dictionaries = target_dictionaries = {"x": dictionary, "y": dictionary}
    channel_names, channel_sizes = ["x"], [len(dictionary)]
    channels, multitask_tasks, tgt_dict_mt, sr, mask_idx = ["x", "y"], {}, None, 16000, len(dictionary) - 1

    def __init__(self):
        super().__init__(argparse.Namespace(**TASK))
        self.args = argparse.Namespace(**GENERAL)

    def get_speaker_embeddings(self, args):
        return None

    def max_positions(self):
        return 32, 32


def task_for(arch):
    if arch.startswith("multilingual_transformer"):
        kind = type("Task", (AnyTask, TASK_REGISTRY["multilingual_translation"]), {"__init__": FairseqTask.__init__})
        made = kind(None)
        made.args = argparse.Namespace(**GENERAL)
        return made
    if arch.startswith(("adatape_parity", "adatape_vit")):
        name = "parity" if arch == "adatape_parity" else "image_classification"
        made = TASK_REGISTRY[name].__new__(TASK_REGISTRY[name])
        FairseqTask.__init__(made, TASK_DATACLASS_REGISTRY[name]())
        made.sequence_length = 8
        made.dictionary = AnyTask.dictionary
        made.classes, made.image_shape, made.image_size, made.channels = ["a", "b"], None, (8, 8), 1
        return made
    return AnyTask()


@functools.lru_cache(None)
def parsed_flags(component, dataclass, arch=None):
    """The flags of a registered component and their defaults."""
    flags = {}
    if dataclass is not None:
        defaults = {name: value for name, value in vars(dataclass()).items() if not name.startswith("_")}
        for name, value in defaults.items():
            plain = type(value) in (int, float, str, bool) and not str(value).startswith(("${", "???"))
            defaults[name] = SIZES.get(name, value if plain else None)
        return defaults
    if hasattr(component, "add_args"):
        parser = argparse.ArgumentParser(conflict_handler="resolve", add_help=False)
        component.add_args(parser)
        flags = {each.dest: each.default for each in parser._actions if each.default is not argparse.SUPPRESS}
    if arch:
        defaults = argparse.Namespace(**{name: value for name, value in flags.items() if value is not None})
        with contextlib.suppress(Exception):
            ARCH_CONFIG_REGISTRY[arch](defaults)
        flags = {**flags, **vars(defaults)}
        sizes = {**SIZES, **(CONVOLUTIONS if "fconv" in arch else {})}
        flags = {name: sizes.get(name, value) for name, value in flags.items()}
    return flags


def model_state(arch, /, **changed):
    """A checkpoint of a small model, without weights; `changed` are flags of the model."""
    component = ARCH_MODEL_REGISTRY[arch]
    dataclass = getattr(component, "__dataclass", None)
    flags = parsed_flags(component, dataclass, arch)
    flags = {name: value for name, value in {**flags, **changed}.items() if value is not None}
    model = {"_name": arch, **flags}
    if dataclass is None:
        model = argparse.Namespace(**{**GENERAL, **model, "arch": changed.get("arch", arch)})
    return state_of(model=model)


def state_of(**parts):
    cfg = {
        "model": {"_name": "transformer"},
        "task": TASK,
        "criterion": {"_name": "cross_entropy", "infonce": False, "main_and_cross_weights": "1,0"},
        "common": {"fp16": False, "tpu": False, "user_dir": CODE, "seed": 1},
        "bpe": None,
        "tokenizer": None,
        "optimization": {"sentence_avg": False, "max_update": 1},
        "dataset": {},
        "checkpoint": {},
        **parts,
    }
    return {
        "args": None,
        "cfg": cfg,
        "model": {},
        "extra_state": {"train_iterator": {"epoch": 1}},
        "optimizer_history": [
            {"criterion_name": "x", "optimizer_name": "x", "lr_scheduler_state": {}, "num_updates": 0}
        ],
    }


@contextlib.contextmanager
def stored(state):
    """Let every checkpoint that is read be this one: saves writing thousands of files."""
    load = torch.load
    torch.load = lambda *args, **kwargs: copy.deepcopy(state)
    try:
        yield "checkpoint.pt"
    finally:
        torch.load = load


def build(state, task=None):
    """Build the model of a checkpoint as the commands do; return what was raised."""
    try:
        with stored(state) as path:
            checkpoint_utils.load_model_ensemble_and_task([path], task=task)
    except Exception as error:
        return error


@contextlib.contextmanager
def building_no_model():
    stock = models.build_model
    models.build_model = lambda *args, **kwargs: torch.nn.Module()
    torch.nn.Module.set_num_updates = lambda self, number: None
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        models.build_model, torch.nn.Module.load_state_dict = stock, load
        del torch.nn.Module.set_num_updates


def build_task(state):
    """Make the task, its data and the criterion of a checkpoint, as fairseq-validate does; return what refused."""
    with stored(state) as path, building_no_model():
        try:
            _, cfg, task = checkpoint_utils.load_model_ensemble_and_task([path])
        except Exception as error:
            return error
        with contextlib.suppress(Exception):
            task.build_criterion(cfg.criterion)
        with contextlib.suppress(Exception):
            task.load_dataset("valid", task_cfg=cfg.task)
