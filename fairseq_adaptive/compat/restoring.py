"""Patches of how fairseq goes on from a checkpoint: what does not fit is said in one line."""

import contextlib
import contextvars
import os
import re

from fairseq_adaptive.errors import UsageError

_anew = contextvars.ContextVar("anew", default=False)


def begins_anew() -> bool:
    """Whether weights are being loaded with which a training begins, and not one that goes on."""
    return _anew.get()


@contextlib.contextmanager
def beginning_anew(anew: bool = True):
    """Say so for what is loaded within."""
    token = _anew.set(anew)
    try:
        yield
    finally:
        _anew.reset(token)


def _short(error):
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:300]} ..."


def _explain(filename, error, reason):
    """What a user can put right about a checkpoint that did not load; None for errors of another origin."""
    if isinstance(reason, UsageError):
        return UsageError(f"{filename}: {reason}")
    text = str(error)
    if isinstance(error, KeyError) or isinstance(reason, KeyError):
        missing = error if isinstance(error, KeyError) else reason
        return UsageError(f"{filename} has no {missing}: it is no checkpoint of a training to go on with")
    if text.startswith("Cannot load model parameters"):
        return UsageError(
            f"the model in {filename} is not that of these flags: {_short(reason)}. Use the flags of its training"
        )
    if isinstance(error, AssertionError) and "please reset the optimizer" in text:
        return UsageError(
            f"{filename} is of a training with another one: {_short(text)}. Or begin anew from its "
            "weights with --finetune-from-model"
        )
    if isinstance(error, ValueError) and "loaded state dict" in text:
        return UsageError(
            f"the optimizer's state in {filename} does not fit ({_short(text)}): use the flags of its "
            "training, or --reset-optimizer"
        )
    return None


def explain_other_training():
    """A checkpoint of another model, criterion or optimizer is refused with the first things that differ.

    Where the optimizer is not resumed, models of ours know that a training begins (:func:`begins_anew`).

    fairseq hides the reason behind "please ensure that the architectures match" and a traceback of both.
    """
    from fairseq.trainer import Trainer

    stock = Trainer.load_checkpoint

    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        try:
            with beginning_anew(reset_optimizer):
                return stock(self, filename, reset_optimizer, *args, **kwargs)
        except Exception as error:
            explained = error if isinstance(error, UsageError) else _explain(filename, error, error.__context__)
            if explained is None or explained is error:
                raise
            raise explained from error

    Trainer.load_checkpoint = load_checkpoint


def find_what_to_restore():
    """``--restore-file`` and ``--finetune-from-model`` that name no file are refused.

    fairseq trains from nothing where the first one is not there. It does so, too, where ``checkpoint_last.pt`` is a
    folder or a link to nothing, and finds a folder in the place of another checkpoint when it has trained.
    """
    from fairseq import checkpoint_utils

    stock = checkpoint_utils.load_checkpoint

    def load_checkpoint(cfg, trainer, *args, **kwargs):
        suffix = trainer.checkpoint_suffix or ""
        _check_places(cfg)
        if cfg.restore_file != "checkpoint_last.pt":
            _check_file("--restore-file", cfg.restore_file.replace(".pt", f"{suffix}.pt"))
        elif cfg.finetune_from_model is not None:
            last = os.path.join(cfg.save_dir, f"checkpoint_last{suffix}.pt")
            if not os.path.exists(last):
                _check_file("--finetune-from-model", cfg.finetune_from_model)
        return stock(cfg, trainer, *args, **kwargs)

    def _check_places(cfg):
        for name in sorted(os.listdir(cfg.save_dir)) if os.path.isdir(cfg.save_dir) else ():
            path = os.path.join(cfg.save_dir, name)
            if not re.fullmatch(r"checkpoint.*\.pt(\.tmp)?", name) or os.path.isfile(path) or not os.path.lexists(path):
                continue
            if os.path.isdir(path):
                raise UsageError(f"{path} is a folder, where a checkpoint is to be: move it away")
            if os.path.islink(path):
                raise UsageError(f"{path} is a link to {os.readlink(path)}, which is not there: mend or remove it")
            raise UsageError(f"{path} is no file that can be read again: move it away")

    def _check_file(flag, path):
        from fairseq.file_io import PathManager

        if not PathManager.isfile(path):
            kind = "is a folder: name a checkpoint in it" if os.path.isdir(path) else "does not exist"
            raise UsageError(f"{flag} {path} {kind}")

    checkpoint_utils.load_checkpoint = load_checkpoint
