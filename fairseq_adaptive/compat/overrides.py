"""A patch of fairseq's ``--model-overrides``: a flag that a checkpoint is too old to have is heard, and a misspelt one told."""

import logging
from argparse import Namespace
from typing import Any, Dict

from omegaconf import DictConfig, OmegaConf, open_dict

logger = logging.getLogger(__name__)


def _has(cfg: DictConfig, name: str) -> bool:
    for key in cfg:
        node = cfg._get_node(key)  # a value may be missing
        if key == name or isinstance(node, DictConfig) and _has(node, name):
            return True
        if not isinstance(node, DictConfig) and isinstance(node._value(), Namespace):
            return True  # fairseq adds anything to it
    return False


def make_room(path, cfg: DictConfig, overrides: Dict[str, Any]) -> None:
    """Add to the flags in a checkpoint those of its model that are overridden and that it has not.

    fairseq overrides flags that are there, and leaves others out without a word.

    Args:
        path: of the checkpoint
        cfg: its flags
        overrides: names and values
    """
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY

    model = OmegaConf.select(cfg, "model")
    name = model.get("_name") if isinstance(model, DictConfig) else None
    owner = MODEL_DATACLASS_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY.get(name, name))
    fields = getattr(owner, "__dataclass_fields__", {})
    for flag in overrides:
        if _has(cfg, flag):
            continue
        if flag in fields:
            with open_dict(model):
                model[flag] = None  # which is overridden next
        elif overrides[flag] is not None:  # else it is as it should be
            logger.warning(f"{path} has no flag {flag!r}: that it is overridden changes nothing. Is it misspelt?")
