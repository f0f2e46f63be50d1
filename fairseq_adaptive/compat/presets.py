"""A patch of fairseq's defaults: a preset is the same model under fairseq-train and fairseq-hydra-train."""


def keep_presets():
    """The values of an architecture come before the defaults of its model's dataclass.

    ``fairseq-hydra-train`` fills in the defaults of the dataclass first; the architecture that ``model._name`` names then
    takes every one of them for a value that the user has given, and trains the model without its sizes.
    """
    from fairseq.dataclass import utils
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY

    stock = utils.merge_with_parent

    def merge_with_parent(dc, cfg, *args, **kwargs):
        name = cfg.get("_name", None)
        if name in ARCH_CONFIG_REGISTRY and MODEL_DATACLASS_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY[name]) is dc:
            _fill(dc, cfg, ARCH_CONFIG_REGISTRY[name])
            if dc.__module__.startswith("fairseq_adaptive."):
                _drop_nones(cfg)
        return stock(dc, cfg, *args, **kwargs)

    utils.merge_with_parent = merge_with_parent  # fairseq.dataclass.initialize.add_defaults imports it when called


def _drop_nones(cfg):
    """``null`` in a configuration says of a flag of ours that it is not given."""
    from omegaconf import open_dict

    with open_dict(cfg):
        for name in [name for name in cfg if cfg._get_node(name)._value() is None]:
            del cfg[name]


def _fill(dc, cfg, architecture):
    """Set what an architecture says of the flags in its dataclass and a configuration does not."""
    from argparse import Namespace

    from fairseq.dataclass import utils
    from omegaconf import OmegaConf, open_dict

    given = {name: value for name, value in OmegaConf.to_container(cfg).items() if value is not None}
    interpolated = {name: value for name, value in given.items() if str(value).startswith("${")}
    filled = Namespace(**{name: cfg[name] if name in interpolated else value for name, value in given.items()})
    architecture(filled)
    with open_dict(cfg):
        for name, value in vars(filled).items():
            field = dc.__dataclass_fields__.get(name)
            # what refers to another part of the configuration, such as the task's --add-bos-token, goes on doing so
            if name not in given and field is not None and not str(field.default).startswith("${"):
                kind = utils.interpret_dc_type(field.type)
                cfg[name] = kind(value) if kind in (int, float, bool) and value is not None else value
