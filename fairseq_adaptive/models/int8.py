"""The flag ``--int8`` of the encoders, and what models do with it."""

from typing import List

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.int8_linear import use_int8

HELP = (
    "run the linear maps of the layers, and the hidden ones of skim predictors, in int8: for inference on a CPU alone, as in "
    "fairseq-validate --model-overrides \"{'int8': True}\"; a training refuses it"
)


class RunsInInt8:
    """Mixin for models whose layers are those of an encoder."""

    def int8(self) -> "RunsInInt8":
        """Run in int8 from now on, for inference on a CPU; the parameters stay as they are.

        Returns:
            the model, in evaluation

        Raises:
            UsageError: on a GPU, in half precision, and where torch or the processor has no products of int8
        """
        self.maps_in_int8: List[str] = use_int8(self)
        return self


def in_int8(model):
    """Return a loaded model that runs in int8.

    Raises:
        UsageError: as :meth:`RunsInInt8.int8`, and for a model of another family
    """
    if not isinstance(model, RunsInInt8):
        raise UsageError(
            f"{type(model).__name__} does not run in int8: transkimmer, albert_act and adatape do, with and without "
            "skimming, halting or a tape; leave int8 out"
        )
    return model.int8()
