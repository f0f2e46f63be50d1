"""Linear maps that run in int8 in inference; their parameters stay as they are."""

import logging
from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import change, is_plain
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS
from fairseq_adaptive.ops import matmul
from fairseq_adaptive.ops.int8_linear import OP, int8_weights, kind
from fairseq_adaptive.ops.int8_linear.eager import WIDEST, Int8Weights, round_input, way

logger = logging.getLogger(__name__)


class Int8Linear(nn.Linear):
    """:class:`torch.nn.Linear` whose product is one of int8 in evaluation without gradients: same parameters, same names.

    Each row of the input has a range of its own (see ``ops/int8_linear/naive.py``), so that a row gives the same, bit by
    bit, whatever rows are beside it. With gradients, under autocast and while it is traced it is the plain map. The int8
    weights are made at first use, and again when others are loaded, written in place or moved; what is written through
    ``weight.data`` is not seen. They are no part of a state dict, of a copy or of a pickle.
    """

    _int8 = None  # the int8 weights, and what they were made of

    @property
    def in_int8(self) -> bool:
        """Whether a call now runs in int8."""
        return not (
            torch.is_grad_enabled() or self.training or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing()
        )

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: ``[..., I]``

        Returns:
            ``[..., O]``

        Raises:
            UsageError: when it was moved to a GPU or to another type
        """
        return self.weights(x)(x) if self.in_int8 else matmul.linear(x, self.weight, self.bias)

    def weights(self, x: Tensor):
        """The weights in int8 for an input, of :func:`~fairseq_adaptive.ops.int8_linear.int8_weights`; raises as
        :meth:`forward`."""
        made_of = [each for each in (self.weight, self.bias) if each is not None]
        state = [
            (id(each), each.data_ptr(), each.dtype, 0 if each.is_inference() else each._version) for each in made_of
        ]
        if self._int8 is None or self._int8[0] != state:
            self._int8 = state, {}
        made, wanted = self._int8[1], kind(x, self.weight)
        if wanted not in made:
            made[wanted] = int8_weights(self.weight, self.bias, wanted)
        return made[wanted]

    def train(self, mode: bool = True):
        if mode:
            raise UsageError("a model in int8 is for inference: load it without int8 to train it")
        return super().train(mode)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_int8"}


def project(x: Tensor, *maps: nn.Module) -> Tuple[Tensor, ...]:
    """Apply several maps to one input, ``[..., I]``, which is rounded once where all run in int8."""
    if all(type(each) is Int8Linear and each.in_int8 and is_plain(each, (Int8Linear,)) for each in maps):
        weights = [each.weights(x) for each in maps]
        x = round_input(x) if all(type(each) is Int8Weights for each in weights) else x
        return tuple(each(x) for each in weights)
    return tuple(each(x) for each in maps)


def _fits(each) -> bool:
    return isinstance(each, nn.Linear) and is_plain(each, LINEARS) and each.in_features <= WIDEST


def use_int8(module: nn.Module, outputs: Sequence[str] = ()) -> List[str]:
    """Let the linear maps within layer stacks and the hidden maps of their routers run in int8 from now on.

    Maps that are changed (:mod:`~fairseq_adaptive.modules.layers.known`: adapters, hooks, subclasses, parametrizations)
    stay as they are; so does all else: embeddings, normalisation, the products and the softmax of attention, activations,
    halting units, the scores of routers, readers and heads. The log says in one line what runs in int8.

    Args:
        module: a model, in evaluation from here on
        outputs: names of further maps, where they are there

    Returns:
        the names of the maps

    Raises:
        UsageError: on a GPU, in half precision, and where there is nothing for it
    """
    from fairseq_adaptive.modules.stack.stack import LayerStack  # layers do not know stacks

    found = {}
    for stack in (each for each in module.modules() if isinstance(each, LayerStack)):
        layers = [stack.layer(number) for number in range(stack.unique_layers)]
        ours = [each for layer in layers for each in layer.modules() if change(each, called=True) is None]
        inner = [each for parent in ours for each in parent.children()]  # and none within an adapter
        found.update(dict.fromkeys(filter(_fits, (*inner, *getattr(stack.router, "hidden_maps", ())))))
    if found:
        named = dict(module.named_modules())
        found.update(dict.fromkeys(filter(_fits, map(named.get, outputs))))
    names = [name for name, each in module.named_modules() if each in found or type(each) is Int8Linear]
    if not names:
        raise UsageError("there is no plain linear map in the layers of this model: leave int8 out")
    for each in found:
        int8_weights(each.weight[:1])  # refused here, and not after a batch was read
        each.__class__ = Int8Linear
    module.eval()
    logger.info(
        "int8: %d linear maps of layers, routers and output layers run by %s%s; embeddings, norms, attention's own products, "
        "activations, halting units, scores and heads stay in fp32",
        len(names),
        "native products, or where these do not fit by " if OP.choose("cpu", torch.float32)[0] == "native" else "",
        way().name,
    )
    return names
