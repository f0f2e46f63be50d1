"""A patch of what fairseq writes for TensorBoard."""

import re

_SHARES = re.compile(r"(\d+:\d*\.\d+)( \d+:\d*\.\d+)*")


def write_histograms():
    """Shares of whole numbers, as ``tape_lens`` is (``3:0.250 4:0.750``), are a histogram; fairseq leaves out what is no number.

    Each number has a bin of its own, whose height is its share.
    """
    from fairseq.logging.progress_bar import TensorboardProgressBarWrapper

    stock = TensorboardProgressBarWrapper._log_to_tensorboard

    def _log_to_tensorboard(self, stats, tag=None, step=None):
        stock(self, stats, tag, step)
        writer = self._writer(tag or "")
        for name, value in stats.items() if writer is not None else ():
            if isinstance(value, str) and _SHARES.fullmatch(value):
                _add_histogram(writer, name, value, stats["num_updates"] if step is None else step)

    TensorboardProgressBarWrapper._log_to_tensorboard = _log_to_tensorboard


def _add_histogram(writer, name, value, step):
    shares = {int(number): float(share) for number, share in (each.split(":") for each in value.split())}
    writer.add_histogram_raw(
        name,
        min=min(shares),
        max=max(shares),
        num=sum(shares.values()),
        sum=sum(number * share for number, share in shares.items()),
        sum_squares=sum(number**2 * share for number, share in shares.items()),
        bucket_limits=[number + 0.5 for number in range(min(shares) - 1, max(shares) + 1)],
        bucket_counts=[shares.get(number, 0.0) for number in range(min(shares) - 1, max(shares) + 1)],
        global_step=step,
    )
    writer.flush()
