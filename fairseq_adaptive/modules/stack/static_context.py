"""A dense run that can be traced: every depth runs, and all that is decided is a mask."""

import functools
from typing import Dict

from torch import Tensor

from fairseq_adaptive.modules.stack.attention import attend_padded
from fairseq_adaptive.modules.stack.context import Context, KeptKeys


class StaticContext(Context):
    """All places of a batch of encoder layers, T x B x C; shapes do not depend on what is decided.

    Args:
        x: T x B x C
        padding_mask: B x T, true at padding
        kv: what is read of tokens that are not computed, ``recompute``, ``keep`` or ``first``
    """

    runs_all = True

    def __init__(self, x: Tensor, padding_mask: Tensor, kv: str = "recompute"):
        super().__init__(x, padding_mask)
        self._keys = KeptKeys(kv) if kv in ("keep", "first") else None

    def arguments(self, stack, depth, x, shown) -> Dict:
        visible = self.running.to(x) if shown.visible is None else shown.visible * self.running
        keys = self._keys and functools.partial(self._keys, stack.schedule[depth], shown)
        attention = stack[depth].self_attn
        return {"self_attention": functools.partial(attend_padded, attention, visible=visible, causal=False, keys=keys)}
