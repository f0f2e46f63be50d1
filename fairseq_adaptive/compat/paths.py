"""Names of files and folders on fairseq's command line that cannot be meant."""

import os

from fairseq_adaptive.errors import UsageError


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
