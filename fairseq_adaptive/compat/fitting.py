"""Patches of how a training starts: whether model and criterion fit each other is asked before anything is trained."""

import os
import sys

from fairseq_adaptive.errors import UsageError


def check_before_training():
    """A criterion with a ``check_model`` is asked about the model when the trainer is built.

    A mistake in flags ended inside the first update before, after data had been read, and left a ``crash.pt`` behind.
    What cannot be known earlier than a batch still ends there, but leaves none as long as nothing has been learned.
    """
    from fairseq.trainer import Trainer

    from fairseq_adaptive.modules import LayerStack
    from fairseq_adaptive.ops.registry import requested

    stock_init, stock_step, stock_save = Trainer.__init__, Trainer.train_step, Trainer.save_checkpoint

    def __init__(self, cfg, task, model, criterion, *args, **kwargs):
        requested()
        for module in model.modules():
            if isinstance(module, LayerStack):
                module.changed  # noqa: B018  raises
        for each in criterion.modules():
            _check_adaptive_softmax(each, model)
        check = getattr(criterion, "check_model", None)
        if check is not None:
            check(model)
        self._has_trained = False
        stock_init(self, cfg, task, model, criterion, *args, **kwargs)

    def train_step(self, *args, **kwargs):
        out = stock_step(self, *args, **kwargs)
        self._has_trained = True
        return out

    def save_checkpoint(self, filename, *args, **kwargs):
        refused = isinstance(sys.exc_info()[1], UsageError)
        if refused and not self._has_trained and os.path.basename(filename) == "crash.pt":
            return None
        return stock_save(self, filename, *args, **kwargs)

    Trainer.__init__, Trainer.train_step, Trainer.save_checkpoint = __init__, train_step, save_checkpoint


def _check_adaptive_softmax(criterion, model):
    """``adaptive_loss`` asserts its adaptive softmax in the first step, and takes no other than fairseq's own."""
    from fairseq.criterions.adaptive_loss import AdaptiveLoss
    from fairseq.modules import AdaptiveSoftmax

    if not isinstance(criterion, AdaptiveLoss):
        return
    softmax = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
    if softmax is None:
        raise UsageError(
            "--criterion adaptive_loss needs a model with an adaptive softmax: add --adaptive-softmax-cutoff, or take "
            "another criterion, such as cross_entropy"
        )
    if not isinstance(softmax, AdaptiveSoftmax):
        raise UsageError(
            f"--criterion adaptive_loss is for fairseq's adaptive softmax, and this model has a {type(softmax).__name__}: "
            "use --criterion adaptive_cross_entropy"
        )
