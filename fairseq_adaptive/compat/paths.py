"""Names of files and folders on fairseq's command line that cannot be meant."""

import os

from fairseq_adaptive.errors import UsageError


def refuse_missing_restore_file():
    """``--restore-file`` that is not there is refused; fairseq trains from nothing.

    The last checkpoint of ``--save-dir`` may be missing, by its own name or as fairseq's default: a training that may
    have to be resumed names it from the first.
    """
    from fairseq import checkpoint_utils

    stock = checkpoint_utils.load_checkpoint

    def load_checkpoint(cfg, trainer, **kwargs):
        name = cfg.restore_file
        last = os.path.join(cfg.save_dir, "checkpoint_last.pt")
        if name != "checkpoint_last.pt" and "://" not in name and os.path.abspath(name) != os.path.abspath(last):
            if not os.path.isfile(name):
                within = os.path.join(cfg.save_dir, name)
                hint = f"; there is {within}" if os.path.isfile(within) else ""
                kind = "a folder" if os.path.isdir(name) else "missing"
                raise UsageError(f"--restore-file {name} is {kind}: name a checkpoint, or leave the flag out to train "
                                 f"anew{hint}")
        return stock(cfg, trainer, **kwargs)

    checkpoint_utils.load_checkpoint = load_checkpoint


def refuse_unwritable_save_dir():
    """``--save-dir`` in which nothing can be written, a file for instance, is refused in one line."""
    from fairseq import checkpoint_utils

    stock = checkpoint_utils.verify_checkpoint_directory

    def verify_checkpoint_directory(save_dir):
        try:
            stock(save_dir)
        except OSError as error:
            kind = "is a file" if os.path.isfile(save_dir) else f"cannot be written to ({error.strerror})"
            raise UsageError(f"--save-dir {save_dir} {kind}: name a folder") from None

    checkpoint_utils.verify_checkpoint_directory = verify_checkpoint_directory
