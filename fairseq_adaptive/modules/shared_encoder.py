"""A Transformer encoder with shared layers for plain torch programs, without fairseq's task and configuration."""

from typing import Optional, Union

from torch import Tensor, nn

from fairseq_adaptive.modules.policies import Halting, Place, build_policy
from fairseq_adaptive.modules.stack import LayerStack, layer_schedule
from fairseq_adaptive.modules.stack.context import Context
from fairseq_adaptive.modules.stack.run import run_dense


class _Batch(Context):
    """T x B x C under torch's own layers."""

    def __init__(self, x, mask, padding_mask):
        super().__init__(x, padding_mask)
        self._mask = mask

    def call(self, stack, depth, x, shown):
        return stack[depth](x, self._mask, self.padding_mask), None


class ParameterSharedTransformerEncoder(nn.Module):
    """M unique ``nn.TransformerEncoderLayer`` run at N depths, batch first.

    The constructor is that of jaketae/param-share-transformer, whose weights load with ``strict=True``. Unlike there,
    the batch is the first dimension in fact and not only in the documentation, the unique layers are initialised
    independently, and any 1 <= M <= N is possible.

    Args:
        d_model: C, width
        nhead: attention heads
        dim_feedforward: inner width of the feed-forward blocks
        dropout: dropout probability
        activation: ``relu`` or ``gelu``, or a callable
        num_unique_layers: M
        num_total_layers: N
        mode: ``sequence``, ``cycle`` or ``cycle_rev`` (:func:`layer_schedule`)
        norm: a LayerNorm after the last layer
        halting: when a token stops: a rule, or the name of one (``act``, ``ut_act``, ``pondernet``, ``saturation``).
            Every token is computed until all have halted; :func:`~fairseq_adaptive.modules.recording` gives the trace

    Raises:
        UsageError: (a ValueError) for a strategy, numbers of layers or a halting rule that are impossible

    Example::

        model = ParameterSharedTransformerEncoder(256, 4, 1024, num_total_layers=12, halting="act")
        with recording(model) as traces:
            states = model(x)
        traces["layers"][0].updates  # B x T
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 16,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation="relu",
        num_unique_layers: int = 3,
        num_total_layers: int = 6,
        mode: str = "cycle_rev",
        norm: bool = False,
        halting: Union[Halting, str, None] = None,
    ):
        super().__init__()
        schedule = layer_schedule(mode, num_unique_layers, num_total_layers)
        place = Place(d_model, num_total_layers, heads=nhead, schedule=schedule)
        self.layers = LayerStack(
            [
                # sequence-first as the seed's: torch's fused path for batch-first layers rounds differently in
                # inference than in training (1e-6) and returns 0 at padding
                nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, activation)
                for _ in range(num_unique_layers)
            ],
            schedule,
            halting=build_policy("halting", halting, place) if isinstance(halting, str) else halting,
        )
        self.norm = nn.LayerNorm(d_model) if norm else None

    def forward(
        self,
        x: Tensor,
        mask: Optional[Tensor] = None,
        src_key_padding_mask: Optional[Tensor] = None,
        verbose: bool = False,
    ) -> Tensor:
        """
        Args:
            x: B x T x C
            mask: T x T, true (or -inf) where the query of a row must not see the key of a column
            src_key_padding_mask: B x T, true at padding
            verbose: print ``layer 0`` ... for the layer used at each depth

        Returns:
            B x T x C
        """

        if verbose:
            for number in self.layers.schedule:
                print(f"layer {number}")
        x = run_dense(self.layers, _Batch(x.transpose(0, 1), mask, src_key_padding_mask))
        return (x if self.norm is None else self.norm(x)).transpose(0, 1)
