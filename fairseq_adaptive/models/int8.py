"""The flag ``--int8``, and what models do with it."""

from typing import List, Tuple

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.int8_linear import use_int8

HELP = (
    "run the linear maps of the layers, the hidden ones of skim predictors and the output layer of a decoder in int8: for "
    "inference on a CPU alone, as in "
    "fairseq-validate or fairseq-generate --model-overrides \"{'int8': True}\"; a training refuses it"
)


class RunsInInt8:
    """Mixin for models that can run in int8.

    Attributes:
        outputs: names of the output layers that do so, too
    """

    outputs: Tuple[str, ...] = ()

    def int8(self) -> "RunsInInt8":
        """Run in int8 from now on, for inference on a CPU; the parameters stay as they are.

        Returns:
            the model, in evaluation

        Raises:
            UsageError: on a GPU, in half precision, and where no map of the layers is a plain one
        """
        self.maps_in_int8: List[str] = use_int8(self, self.outputs)
        return self


def add_int8_args(parser):
    """Add ``--int8`` to a model's parser."""
    parser.add_argument("--int8", action="store_true", help=HELP)


def as_asked(model: RunsInInt8, args) -> RunsInInt8:
    """Return a model that was built, in int8 where its flags ask for it; raises as :meth:`RunsInInt8.int8`."""
    return model.int8() if getattr(args, "int8", False) else model


def in_int8(model):
    """Return a loaded model that runs in int8.

    Raises:
        UsageError: as :meth:`RunsInInt8.int8`, and for a model of another family
    """
    if not isinstance(model, RunsInInt8):
        raise UsageError(
            f"{type(model).__name__} does not run in int8: transkimmer, albert_act, adatape, shared_transformer and "
            "shared_transformer_lm do, with any policy; leave int8 out"
        )
    return model.int8()
