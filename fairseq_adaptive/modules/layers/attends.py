"""What policies ask of a layer with self-attention; plain torch."""

import contextlib
from typing import Tuple

from torch import Tensor

from fairseq_adaptive.modules.layers.depth_lora import at_depth
from fairseq_adaptive.modules.layers.int8_linear import project


class Attends:
    """What a stack's policies ask of a layer with self-attention."""

    step_kind = "layer"
    native = None  # of a layer that can be one native call, see native_layer.py
    lora_rank = 0  # of what its maps differ by from depth to depth

    def running_at(self, depth: int):
        """While this is open, the maps and norms are those of a depth."""
        return at_depth(depth) if self.lora_rank else contextlib.nullcontext()

    @property
    def attends(self):
        """The block that has keys and values."""
        return self

    def before(self, x: Tensor) -> Tensor:
        """What self-attention reads of states, ... x C."""
        return self.self_attn_layer_norm(x) if self.normalize_before else x

    def keys_and_values(self, read: Tensor) -> Tuple[Tensor, Tensor]:
        """Those of what self-attention reads, ... x C."""
        return project(read, self.self_attn.k_proj, self.self_attn.v_proj)

    def macs(self, work) -> Tensor:
        """Multiply-adds, B, of a :class:`~fairseq_adaptive.modules.stack.compute.Work`."""
        dim, ffn_dim, rank = self.embed_dim, self.fc1.out_features, self.lora_rank
        made, read = work.made, work.read

        def product(into, out=dim):
            return into * out + rank * (into + out)

        if work.source is not None and getattr(self, "cross_self_attention", False):
            made, read = made + work.source_made, read + work.source
        attention = 2 * product(dim) * (work.computed + made) + 2 * dim * work.computed * read
        total = attention + 2 * product(ffn_dim) * (work.computed - work.tape)
        tape_ffn, cross = getattr(self, "tape_ffn", None), getattr(self, "encoder_attn", None)
        total = total + work.tape * (
            2 * product(ffn_dim) if tape_ffn is None else 3 * product(tape_ffn.fc2.in_features)
        )
        if work.source is not None and cross is not None:
            projected = (
                2 * product(dim) * work.computed + (product(cross.kdim) + product(cross.vdim)) * work.source_made
            )
            total = total + projected + 2 * dim * work.computed * work.source
        return total
