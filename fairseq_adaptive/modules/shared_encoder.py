"""A Transformer encoder with shared layers for plain torch programs, without fairseq's task and configuration."""

from typing import Optional, Union

from torch import Tensor, nn

from fairseq_adaptive.modules.policies import Halting, Reader, Router
from fairseq_adaptive.modules.stack.foreign import ForeignStack
from fairseq_adaptive.modules.stack.schedule import layer_schedule


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
        halting: when a token stops: a rule, or the name of one (``act``, ``ut_act``, ``pondernet``, ``saturation``)
        router: which tokens are computed at each depth: a router, or a name (``skimming``, ``mixture_of_depths``)
        reader: which tokens join: a reader, or a name (``tape``)
        router_kv, halting_kv: what others see of tokens that are not computed, ``active`` or ``recompute``, see
            :class:`~fairseq_adaptive.modules.ForeignStack`, which says what is saved in evaluation without gradients

    Raises:
        UsageError: (a ValueError) for a strategy, numbers of layers or policies that are impossible

    Example::

        model = ParameterSharedTransformerEncoder(256, 4, 1024, num_total_layers=12, halting="act", halting_kv="active")
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
        router: Union[Router, str, None] = None,
        reader: Union[Reader, str, None] = None,
        router_kv: Optional[str] = None,
        halting_kv: Optional[str] = None,
    ):
        super().__init__()
        schedule = layer_schedule(mode, num_unique_layers, num_total_layers)
        # sequence-first as the seed's: torch's fused path for batch-first layers rounds differently in inference than in
        # training (1e-6) and returns 0 at padding
        layers = [
            nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, activation)
            for _ in range(num_unique_layers)
        ]
        self.layers = ForeignStack(
            layers,
            d_model,
            schedule,
            halting=halting,
            router=router,
            reader=reader,
            heads=nhead,
            router_kv=router_kv,
            halting_kv=halting_kv,
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
            B x T x C; with a reader B x (T + S) x C, the padding mask B x (T + S), and what was read
        """
        if verbose:
            for number in self.layers.schedule:
                print(f"layer {number}")
        out = self.layers(x, src_key_padding_mask, mask)
        x, *rest = (out,) if isinstance(out, Tensor) else out
        x = x if self.norm is None else self.norm(x)
        return (x, *rest) if rest else x
