"""fairseq's own numbers that it takes without a word and then ignores, or dies of in the middle."""

from fairseq_adaptive.ranges import BATCH, COUNT, DISTANCE, PRICE, UPDATES, Range

_RATE = Range(float, 0, 1000)
_RANGES = {
    "dataset": {
        "batch_size": BATCH,
        "batch_size_valid": BATCH,
        "max_tokens": COUNT,
        "max_tokens_valid": COUNT,
        "num_workers": Range(int, 0, 4096),
        "data_buffer_size": DISTANCE,
        "required_batch_size_multiple": BATCH,
        "required_seq_len_multiple": BATCH,
        "validate_interval": COUNT,
        "validate_interval_updates": UPDATES,
        "max_valid_steps": UPDATES,
    },
    "optimization": {
        "clip_norm": PRICE,
        "max_epoch": UPDATES,
        "max_update": UPDATES,
        "update_freq": BATCH,
        "lr": _RATE,
    },
    "checkpoint": {"save_interval": COUNT, "save_interval_updates": UPDATES},
    "common": {"log_interval": COUNT},
    "eval_lm": {"context_window": DISTANCE},
}


def _check(cfg):
    for group, ranges in _RANGES.items():
        for name, within in ranges.items():
            value = cfg.get(group, {}).get(name)
            for each in value if name in ("update_freq", "lr") else [value]:
                if each is not None:
                    within.check(each, "--" + name.replace("_", "-"))


def check_stock_numbers():
    """Numbers of fairseq's own flags that are out of range are refused before anything is read.

    ``--batch-size 0`` trained with batches of any size, ``--clip-norm nan`` without clipping, ``--max-update -1`` for no
    update; ``--update-freq 0`` and ``--num-workers -1`` were tracebacks.

    fairseq-hydra-train imports ``--user-dir`` later: there before the first update.
    """
    from fairseq.distributed import utils as distributed_utils
    from fairseq.trainer import Trainer

    stock_main, stock_init = distributed_utils.call_main, Trainer.__init__

    def call_main(cfg, main, **kwargs):
        _check(cfg)
        return stock_main(cfg, main, **kwargs)

    def __init__(self, cfg, *args, **kwargs):
        _check(cfg)
        stock_init(self, cfg, *args, **kwargs)

    distributed_utils.call_main, Trainer.__init__ = call_main, __init__
