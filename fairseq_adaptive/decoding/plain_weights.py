"""What an encoder and a decoder compute, as weights, where nothing else is in them."""

from typing import Callable, List, Tuple

import torch
import torch.nn.functional as F
from fairseq.modules import gelu
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fairseq_adaptive.decoding.decoder_step import KNOWN, MAPS, plain
from fairseq_adaptive.modules.layers.admin import AdminResidual
from fairseq_adaptive.modules.layers.attention import FastAttention
from fairseq_adaptive.modules.layers.depth_lora import PARTS, layers_to_lay_out, weight_and_bias
from fairseq_adaptive.modules.layers.int8_linear import Int8Linear
from fairseq_adaptive.modules.layers.known import HOOKS, first_change
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS
from fairseq_adaptive.modules.layers.residual import FUSABLE
from fairseq_adaptive.modules.layers.transformer_layer import EncoderLayer
from fairseq_adaptive.modules.policies.act import ACT, UniversalACT
from fairseq_adaptive.modules.policies.confidence import Margin, Saturation
from fairseq_adaptive.modules.policies.pondernet import PonderNet
from fairseq_adaptive.modules.stack.stack import LayerStack
from fairseq_adaptive.ops.decoder_step import Decoder, Halting, Int8Map, Layer, Map, Norm, Stack

_RULES = {ACT: "act", UniversalACT: "ut_act", PonderNet: "pondernet", Saturation: "saturation", Margin: "margin"}
_ACTIVATIONS = {F.relu: "relu", gelu: "gelu"}
_ENCODER = (LayerStack, EncoderLayer, FastAttention, *KNOWN)
Found = Tuple[Callable, List[Tensor], Tuple]


class Unfit(Exception):
    """What is in a model beside the weights that are known, in words."""


def require_nothing_else():
    """
    Raises:
        Unfit: where something watches or changes torch's operations, or gradients are wanted
    """
    if any(getattr(torch_module, f"_global{name}") for name in HOOKS):
        raise Unfit("there are global hooks")
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        raise Unfit("something watches torch's operations")
    if torch.is_grad_enabled():
        raise Unfit("gradients are on")
    if torch.is_autocast_enabled("cpu"):
        raise Unfit("autocast is on")


def _within(module):
    """A module and all in it, as ``modules()`` gives them, in a fraction of its time: it is asked in every search."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _within(child)


def _require(modules, types=()):
    why = first_change(modules, types)
    if why is not None:
        raise Unfit(why)


def _norm(norm, depth=0):
    if norm is None:
        return None
    return Norm(*weight_and_bias(norm, depth), norm.eps)


def _layer(layer, depth):
    own, source = layer.self_attn, getattr(layer, "encoder_attn", None)
    cross, norm = {}, None

    def of(*linears):
        kind = Int8Map if type(linears[0]) is Int8Linear else Map
        weights, biases = zip(*(weight_and_bias(each, depth) for each in linears))
        if len(linears) == 1:
            return kind(weights[0], biases[0])
        return kind(torch.cat(weights), None if biases[0] is None else torch.cat(biases))

    if source is not None:
        cross = {"query": of(source.q_proj), "source": of(source.k_proj, source.v_proj)}
        cross["merge_source"], norm = of(source.out_proj), _norm(layer.encoder_attn_layer_norm, depth)
    norms = _norm(layer.self_attn_layer_norm, depth), norm, _norm(layer.final_layer_norm, depth)
    maps = of(own.q_proj, own.k_proj, own.v_proj), of(own.out_proj), of(layer.fc1), of(layer.fc2)
    return Layer(norms, *maps, **cross)


def _stack(stack, last):
    layers, schedule = layers_to_lay_out(stack)
    add, (first, _) = stack.residual, layers[0]
    omega = None if add is None else add.start.unsqueeze(-1) + add.offset
    activation, heads, pre_norm = _ACTIVATIONS[first.activation_fn], first.self_attn.num_heads, first.normalize_before
    return Stack([_layer(*each) for each in layers], schedule, heads, pre_norm, activation, omega, _norm(last))


def _check_stack(stack, last, embedding):
    """Refuse what a :class:`Stack` cannot say.

    Args:
        last: the norm behind the stack, or None
        embedding: modules before the stack
    """
    if stack.router is not None:
        raise Unfit("a router chooses tokens")
    layers = [stack.layer(number) for number in range(stack.unique_layers)]
    if stack.residual is not None:
        _require([stack.residual], (AdminResidual,))
    shapes, norms = set(), [each for each in (last, *embedding) if each is not None]
    _check_int8(each for layer in layers for each in _within(layer))
    for layer in layers:
        attentions = [each for each in (layer.self_attn, getattr(layer, "encoder_attn", None)) if each is not None]
        norms += [each for name, each in layer.named_children() if name.endswith("layer_norm")]
        if layer.activation_fn not in _ACTIVATIONS:
            raise Unfit(f"the activation is {getattr(layer.activation_fn, '__name__', 'unknown')}")
        for each in attentions:
            if len({part.bias is None for part in (each.q_proj, each.k_proj, each.v_proj)}) > 1:
                raise Unfit("some maps of attention have no bias")
        named = [pair for each in _within(layer) for pair in each._parameters.items()]
        sizes = [part.shape for name, part in named if part is not None and name not in PARTS]
        shapes.add((layer.activation_fn, layer.normalize_before, *sizes, *(each.num_heads for each in attentions)))
    if len(shapes) > 1:
        raise Unfit("layers differ")
    if any(each.weight is None or each.bias is None for each in norms):
        raise Unfit("a norm has no weights")


def _check_int8(modules):
    """Refuse maps of which some run in int8, and others do not, or that read no whole vectors, or heads that are none."""
    modules = list(modules)
    small = [type(each) is Int8Linear for each in modules if isinstance(each, nn.Linear)]
    if not any(small):
        return
    if not all(small):
        raise Unfit("some maps are in int8, and some are not")
    from fairseq_adaptive.ops.encoder_layer.native import small_obstacle  # loads the library

    sizes = [getattr(each, "in_features", None) or getattr(each, "head_dim", 0) for each in modules]
    why = small_obstacle(*sizes)
    if why is not None:
        raise Unfit(why)


def _parts(module) -> List[Tensor]:
    parts, others = [], []
    for each in _within(module):
        parts += [part for part in each._parameters.values() if part is not None]
        others += [other for other in each._buffers.values() if other is not None]
    for each in parts:
        if type(each) is not nn.Parameter or each.dtype != torch.float32 or not each.is_cpu:
            raise Unfit("weights are not all float32 on the CPU")
    return parts + others


def _rest(stack):
    layers = [stack.layer(number) for number in range(stack.unique_layers)]
    return (stack.schedule, [(each.activation_fn, each.normalize_before, type(each.fc1)) for each in layers])


def _halts_at(rule):
    return getattr(rule, "halts_at", getattr(rule, "threshold", None))


def decoder_weights(decoder) -> Found:
    """Return a function that gives the :class:`Decoder` that a decoder with ``begin_search`` is, what tensors it is made
    of, and what else.

    Raises:
        Unfit: with what a step cannot compute
    """
    stack = decoder.layers
    for name, what in (("adaptive_softmax", "the softmax is adaptive"), ("quant_noise", "there is quantization noise")):
        if getattr(decoder, name) is not None:
            raise Unfit(what)
    if decoder.project_in_dim is not None or decoder.project_out_dim is not None:
        raise Unfit("embeddings are projected")
    _require([decoder.embed_tokens], (nn.Embedding,))
    _require([decoder.output_projection], MAPS)
    _check_int8([decoder.output_projection])
    others = [each for each in (decoder.layernorm_embedding, decoder.layer_norm) if each is not None]
    _require([decoder.dropout_module, *others], KNOWN)
    dropout = decoder.dropout_module
    if dropout.apply_during_inference or dropout.training or decoder.embed_tokens.max_norm is not None:
        raise Unfit("the embedding is changed on the way")
    if decoder.output_projection.bias is not None:
        raise Unfit("the output layer has a bias")
    _check_stack(stack, decoder.layer_norm, others)
    rule = stack.halting
    if rule is not None:
        if type(rule) not in _RULES or stack.hides:
            raise Unfit(f"tokens halt by {type(rule).__name__} and are seen in another way")
        _require([rule], tuple(_RULES))
        if rule.reads_position:
            raise Unfit("the threshold of halting falls over the sentence")
        if getattr(rule, "scores", None) not in (None, decoder.word_scores):
            raise Unfit(f"{type(rule).__name__} asks other words than those of the output layer")
        if hasattr(rule, "unit"):
            _require([rule.unit], LINEARS)

    def make():
        halting = Halting()
        if rule is not None:
            unit = getattr(rule, "unit", None)
            unit = (None, 0.0) if unit is None else (unit.weight[0], float(unit.bias))
            halting = Halting(_RULES[type(rule)], _halts_at(rule), *unit)
        return Decoder(
            _stack(stack, decoder.layer_norm),
            decoder.embed_tokens.weight,
            decoder.embed_scale,
            decoder.output_projection.weight,
            _norm(decoder.layernorm_embedding),
            halting,
            type(decoder.output_projection) is Int8Linear,
        )

    rest = decoder.embed_scale, type(decoder.output_projection), type(rule), _halts_at(rule)
    return make, _parts(decoder), (*_rest(stack), *rest)


def encoder_weights(encoder, net_input) -> Found:
    """As :func:`decoder_weights`, the :class:`Stack` of an encoder whose own method embeds the tokens.

    Raises:
        Unfit: with what :func:`~fairseq_adaptive.ops.decoder_step.native.encode` cannot compute
    """
    if set(net_input) - {"src_tokens", "src_lengths", "prev_output_tokens"}:
        raise Unfit("the encoder gets more than tokens")
    stack = encoder.layers
    _require([encoder])
    if encoder.reader is not None or stack.halting is not None:
        raise Unfit("tokens join or halt")
    if stack.recorder is not None or stack.training:
        raise Unfit("the run is recorded, or a training")
    layers = [stack.layer(number) for number in range(stack.unique_layers)]
    if encoder.layer_norm is not None:
        _require([encoder.layer_norm], FUSABLE)
    _require((stack, *(each for layer in layers for each in _within(layer))), _ENCODER)
    if any(layer.tape_ffn is not None for layer in layers) or not all(map(plain, layers)):
        raise Unfit("its layers are not plain")
    _check_stack(stack, encoder.layer_norm, ())
    return lambda: _stack(stack, encoder.layer_norm), _parts(encoder), _rest(stack)
