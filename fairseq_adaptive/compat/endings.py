"""Patches of how a training ends: when it is told to, once, and also after it was stopped and resumed in between."""

import copy
import logging
import math
import sys

logger = logging.getLogger(__name__)
_KEPT = ("best", "num_runs")  # what fairseq's early stopping remembers, as attributes of a function


def _early_stop():
    """fairseq's function that counts for ``--patience``; None where no training runs."""
    for module in "__main__", "fairseq_cli.train":  # the first one with python -m
        found = getattr(sys.modules.get(module), "should_stop_early", None)
        if found is not None:
            return found
    return None


def resume_patience():
    """``--patience`` counts on after a resume, and from nothing in a new training.

    fairseq keeps the counter and the best scores as attributes of functions: a resume forgets the counter, and a second
    training in one process (``--multirun``) begins with the best score of the first one.
    """
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    stock_state_dict, stock_load = Trainer.state_dict, Trainer.load_checkpoint

    def state_dict(self):
        state = stock_state_dict(self)
        state["extra_state"]["early_stop"] = {
            name: getattr(_early_stop(), name) for name in _KEPT if hasattr(_early_stop(), name)
        }
        return state

    def load_checkpoint(
        self, filename, reset_optimizer=False, reset_lr_scheduler=False, optimizer_overrides=None, reset_meters=False
    ):
        counter = _early_stop()
        for holder, names in (counter, _KEPT), (checkpoint_utils.save_checkpoint, ("best",)):
            for name in names:
                if hasattr(holder, name):
                    delattr(holder, name)
        extra_state = stock_load(
            self, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters=reset_meters
        )
        if extra_state and counter and not reset_optimizer and not reset_meters:
            kept = extra_state.get("early_stop") or {}
            if "best" in extra_state:  # all that checkpoints before this patch have
                kept = {"best": extra_state["best"], "num_runs": 0, **kept}
            for name in set(kept).intersection(_KEPT):
                setattr(counter, name, kept[name])
        return extra_state

    Trainer.state_dict, Trainer.load_checkpoint = state_dict, load_checkpoint


def end_what_is_finished():
    """A training that has ended and is run again says so and ends.

    fairseq trains one more update each time and overwrites ``checkpoint_last.pt`` with it: it looks at
    ``--max-update`` and ``--stop-time-hours`` after an update, and at ``--patience`` after a validation.
    """
    from fairseq import checkpoint_utils

    stock = checkpoint_utils.load_checkpoint

    def load_checkpoint(cfg, trainer, *args, **kwargs):
        extra_state, epoch_itr = stock(cfg, trainer, *args, **kwargs)
        if not trainer.get_num_updates():
            trainer._previous_training_time = 0  # a new training, if from other weights
        elif (reason := _finished(cfg, trainer, epoch_itr)) is not None:
            logger.info(f"finished: this training has ended after {trainer.get_num_updates()} updates, {reason}")
            epoch_itr = copy.copy(epoch_itr)
            epoch_itr.__class__ = type(
                "EndedIterator", (type(epoch_itr),), {"next_epoch_idx": math.nan}
            )  # no last epoch, nor infinity, is after that
        return extra_state, epoch_itr

    checkpoint_utils.load_checkpoint = load_checkpoint


def _finished(cfg, trainer, epoch_itr):
    optimization = trainer.cfg.optimization
    hours = trainer._previous_training_time / 3600
    failures = getattr(_early_stop(), "num_runs", 0)
    if optimization.max_update and trainer.get_num_updates() >= optimization.max_update:
        return f"as --max-update {optimization.max_update} says: raise it to go on"
    if optimization.max_epoch and epoch_itr.next_epoch_idx > optimization.max_epoch:
        return f"as --max-epoch {optimization.max_epoch} says: raise it to go on"
    if 0 < optimization.stop_time_hours < hours:
        return f"after {hours:.2f} hours, as --stop-time-hours {optimization.stop_time_hours} says: raise it to go on"
    if 0 < cfg.patience <= failures:
        return (
            f"as --patience {cfg.patience} says, after {failures} validations without a better score: raise it to go on"
        )
    return None
