"""Patches of how fairseq loads trained models: a path that names none, or one of other data, is said in one line."""

from fairseq_adaptive.errors import UsageError


class _Foreign(UsageError):
    """A file of another program; the message goes on behind its name."""


def name_wrong_checkpoints():
    """``--path`` and others that name no checkpoint, a folder, or a file of another program are refused by name.

    So is a model that does not fit, most often as the dictionary in the folder of the data is that of other data.
    """
    from fairseq import checkpoint_utils, utils

    stock_read, stock_upgrade = checkpoint_utils.load_checkpoint_to_cpu, checkpoint_utils._upgrade_state_dict
    stock_load, stock_split = checkpoint_utils.load_model_ensemble_and_task, utils.split_paths

    def upgrade(state):
        if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
            kind = f"has {', '.join(map(str, list(state)[:4]))}" if isinstance(state, dict) else type(state).__name__
            raise _Foreign(
                f"is no checkpoint of fairseq, which has the weights under 'model' ({kind}); one of another "
                "program must be converted first"
            )
        return stock_upgrade(state)

    def load_checkpoint_to_cpu(path, *args, **kwargs):
        try:
            return stock_read(path, *args, **kwargs)
        except _Foreign as error:
            raise UsageError(f"{path} {error}") from None
        except IsADirectoryError:
            raise UsageError(f"{path} is a folder: name a checkpoint in it, as checkpoint_best.pt") from None

    def load_model_ensemble_and_task(filenames, *args, **kwargs):
        names = ":".join(map(str, filenames))
        if None in filenames:
            raise UsageError("--path is missing: the checkpoint to evaluate")
        try:
            return stock_load(filenames, *args, **kwargs)
        except UsageError as error:
            if "the checkpoint " in str(error):  # our models, which do not know its name
                raise UsageError(f"{names}: {error}") from error
            raise
        except OSError as error:
            if "Model file not found" not in str(error):
                raise
            raise UsageError(f"checkpoint {str(error).split(': ', 1)[1]} does not exist") from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            if "keys" in reason and "Neither args nor cfg" in reason:
                raise UsageError(f"{names} does not say which model it holds: it is no checkpoint of a training")
            if not reason.startswith("Error(s) in loading state_dict"):
                raise
            raise UsageError(
                f"the model in {names} does not fit: {reason[:300]}. Its data must have the dictionary of "
                "its training, and --model-overrides must not change its size"
            ) from error

    def split_paths(paths, *args, **kwargs):
        if paths is None:
            raise UsageError("a path is missing: the folder of the data, or --path with a checkpoint")
        return stock_split(paths, *args, **kwargs)

    checkpoint_utils._upgrade_state_dict = upgrade
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    checkpoint_utils.load_model_ensemble_and_task, utils.split_paths = load_model_ensemble_and_task, split_paths
