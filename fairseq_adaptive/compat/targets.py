"""A patch of fairseq-train: criterions with a target learn how many updates there will be, and say what they missed."""

import functools
import math

from fairseq_adaptive.compat.evaluation import running


def updates_of(cfg, batches: int):
    """How many updates a training has, from ``--max-update``, ``--max-epoch`` and ``--update-freq``; None: no end.

    Args:
        cfg: of fairseq-train
        batches: of a worker in an epoch
    """
    flags = cfg.optimization
    ends = [flags.max_update] if flags.max_update else []
    if flags.max_epoch:
        frequencies = list(flags.update_freq) or [1]
        each = (frequencies[min(epoch, len(frequencies) - 1)] for epoch in range(flags.max_epoch))
        ends.append(sum(math.ceil(batches / frequency) for frequency in each))
    return min(ends) if ends else None


def steer_to_the_end():
    """fairseq tells a criterion neither how long a training is nor when it ends: a target is to be reached within it."""
    for module in running("train"):
        module.train = _told(module.train)


def _told(train):
    @functools.wraps(train)
    def told(cfg, trainer, task, epoch_itr):
        criterions = [each for each in trainer._criterion.modules() if hasattr(each, "prepare_targets")]
        total = updates_of(cfg, len(epoch_itr))
        for each in criterions:
            each.prepare_targets(total)
        losses, should_stop = train(cfg, trainer, task, epoch_itr)
        last = bool(cfg.optimization.max_epoch) and epoch_itr.epoch >= cfg.optimization.max_epoch
        if should_stop or last:
            for each in criterions:
                each.report_targets(trainer.get_num_updates())
        return losses, should_stop

    return told
