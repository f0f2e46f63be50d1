"""A patch of fairseq's evaluations: they say where they begin and end."""

import sys

# what evaluates a model whose weights nothing changes meanwhile, in fairseq_cli
_EVALUATIONS = {
    "eval_lm": "eval_lm",
    "generate": "main",
    "interactive": "main",
    "train": "validate",
    "validate": "main",
    "hydra_validate": "validate",
}


def running(command):
    """The modules, 0 to 2, in which a command of fairseq_cli has been imported: by name, and as ``python -m``."""
    name, main = f"fairseq_cli.{command}", sys.modules["__main__"]
    started = main if getattr(getattr(main, "__spec__", None), "name", None) == name else None
    return list(filter(None, (sys.modules.get(name), started)))


def hold_weights():
    """Within an evaluation and within a search weights are laid out once for all products to come.

    Of the commands only those that run already are patched: ``--user-dir`` is imported before their work begins, and
    importing the others would set up their logging. A command that is imported later is right, and a little slower.
    """
    from fairseq.sequence_generator import SequenceGenerator

    from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights

    for command, function in _EVALUATIONS.items():
        for module in running(command):
            setattr(module, function, constant_weights()(getattr(module, function)))
    SequenceGenerator._generate = constant_weights()(SequenceGenerator._generate)
