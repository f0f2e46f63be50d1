"""Learning from the output of another model, in any criterion."""

import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.watched import Watched


def without_teacher(cfg):
    """Return a criterion's configuration, changed so that it needs no teacher: to measure the model that has learned."""
    if OmegaConf.select(cfg, "distill_from"):
        cfg.distill_from = None
    return cfg


def _load(path, task):
    if not PathManager.exists(path):
        raise UsageError(f"--distill-from {path} does not exist")
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    name = OmegaConf.select(state.get("cfg") or OmegaConf.create(), "task._name")
    theirs = TASK_REGISTRY.get(name, type(task))
    if not isinstance(task, theirs) and not issubclass(theirs, type(task)):
        raise UsageError(
            f"--distill-from {path}: the teacher was trained with --task {name}; train one on the same task"
        )
    return checkpoint_utils.load_model_ensemble([path], task=task, state=state)[0][0]


class Teacher:
    """A trained model whose output another one learns to give.

    Args:
        path: its checkpoint
        task: of both

    Raises:
        UsageError: when there is none, or one of another task
    """

    def __init__(self, path: str, task):
        self._model = _load(path, task).eval().requires_grad_(False)

    def loss(self, watched: Watched, temperature: float):
        """Mean over the output's rows of KL(teacher || student) at a temperature, times its square (Hinton et al.,
        2015); of a single output its squared difference.

        Raises:
            UsageError: when the two models' outputs have different shapes
        """
        args, kwargs = watched.call
        self._model.to(watched.output.device)
        with torch.no_grad():
            taught = self._model(*args, **kwargs)[0].float()
        given = watched.output.float()
        if taught.shape != given.shape:
            raise UsageError(
                f"--distill-from: the teacher's output has the shape {tuple(taught.shape)}, the model's "
                f"{tuple(given.shape)}: train the teacher on the same task"
            )
        if given.size(-1) == 1:
            return F.mse_loss(given, taught)
        taught, given = ((each / temperature).log_softmax(-1).flatten(0, -2) for each in (taught, given))
        return F.kl_div(given, taught, reduction="batchmean", log_target=True) * temperature**2
