"""Operations that torch's ``FlopCounterMode`` does not know: left out, a dense run seems to cost less than it does."""

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

if _FORWARD not in flop_registry:

    @register_flop_formula(_FORWARD)
    def _attention(query_shape, key_shape, value_shape, *args, **kwargs):
        return sdpa_flop_count(query_shape, key_shape, value_shape)


if torch.ops.aten.conv_tbc not in flop_registry:

    @register_flop_formula(torch.ops.aten.conv_tbc)
    def _convolution(x_shape, weight_shape, *args, out_shape=None, **kwargs):
        return 2 * torch.Size(out_shape).numel() * weight_shape[0] * weight_shape[1]


if _BACKWARD not in flop_registry:

    @register_flop_formula(_BACKWARD)
    def _attention_backward(grad_shape, query_shape, key_shape, value_shape, *args, **kwargs):
        return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)
