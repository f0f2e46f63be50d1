"""Tensors by the original's names, in double precision while they are used."""

from functools import partial
from typing import Mapping, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor

# by their names in config.json
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
PIECE = 8192  # rows of a large table that are made double at a time


class Doubles:
    """Weights by name; each is made double when it is asked for, and again when it is asked for again.

    Args:
        tensors: by name, as read from the original's file
        prefix: of the body's names, which some files have and others have not
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        self._tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].double()

    def first(self, *names: str) -> str:
        """The first of the names that there is.

        Raises:
            KeyError: when there is none
        """
        for name in names:
            if name in self._tensors:
                return name
        raise KeyError(names[0])

    def rows(self, name: str, numbers: Union[int, Sequence[int]]) -> Tensor:
        """Rows ``[T, C]`` of a table; of one number ``[C]``."""
        return self._tensors[name][torch.as_tensor(numbers)].double()

    def linear(self, name: str, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., D]``."""
        return F.linear(x, self[name + ".weight"], self[name + ".bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """LayerNorm; the first BERT files call its weight gamma and its bias beta."""
        weight, bias = self.first(name + ".weight", name + ".gamma"), self.first(name + ".bias", name + ".beta")
        return F.layer_norm(x, x.shape[-1:], self[weight], self[bias], eps)

    def scores(self, name: str, x: Tensor, start: int = 0, end: Optional[int] = None) -> Tensor:
        """Products ``[T, R]`` of ``x`` ``[T, C]`` and the rows of a table from ``start`` to ``end``."""
        return torch.cat([x @ piece.double().T for piece in self._tensors[name][start:end].split(PIECE)], 1)
