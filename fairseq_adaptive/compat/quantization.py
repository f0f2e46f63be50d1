"""Patches of fairseq's quantization."""

import torch


def quantize_anywhere():
    """``--quant-noise-scalar`` trains on a CPU.

    fairseq moves the scales that it measures to a GPU. One of its three methods also asks torch for them by a name that
    torch does not have.
    """
    from fairseq.modules.quantization.scalar import ops

    observers = torch.ao.quantization.observer

    def emulate_with(observer, **flags):
        def emulate(w, scale=None, zero_point=None, bits=8):
            if scale is None:
                observing = observer(**flags).to(w.device)
                observing(w.float())
                scale, zero_point = (value.to(w) for value in observing.calculate_qparams()[:2])
            return ops.quantize(w, scale, zero_point, bits=bits), scale, zero_point

        return emulate

    ops.emulate_int8_histogram = emulate_with(observers.HistogramObserver)
    ops.emulate_int8_tensor = emulate_with(observers.MinMaxObserver)
    ops.emulate_int8_channel = emulate_with(
        observers.PerChannelMinMaxObserver, ch_axis=-1, qscheme=torch.per_channel_symmetric
    )


def quantize_our_maps():
    """fairseq's quantization takes the linear maps of our models for what they are.

    ``--quant-noise-scalar`` and ``--quantization-config-path`` look for ``nn.Linear`` by the class, and by its name."""
    from fairseq.modules.quantization.pq import utils
    from fairseq.modules.quantization.scalar.utils import MAPPING
    from torch import nn

    from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear

    MAPPING[PrepackedLinear] = MAPPING[nn.Linear]
    get_param = utils.get_param

    def get(module, layer_name, param_config):
        if type(module) is PrepackedLinear:
            module = nn.Linear(module.in_features, module.out_features, device="meta")
        return get_param(module, layer_name, param_config)

    utils.get_param = get
