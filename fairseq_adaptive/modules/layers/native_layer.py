"""Encoder layers and skim predictors, each one call of :mod:`fairseq_adaptive.ops.encoder_layer`: in packed runs, and in runs
without policies.

The operation reads weights and calls nothing, so it serves what is all known, in float32 (or int8) on a CPU, without
gradients, and while :func:`~fairseq_adaptive.modules.layers.prepacked_linear.constant_weights` is open, since it lays weights
out. Elsewhere modules are called, and the log says why; where ``FAIRSEQ_ADAPTIVE_KERNELS=native`` asks for it, that is an
error.
"""

import functools
import os
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.int8_linear import Int8Linear
from fairseq_adaptive.modules.layers.known import HOOKS, any_global_hooks, first_change, say_once
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS, made_of_constants
from fairseq_adaptive.ops.decoder_step import Int8Map, Layer, Map, Norm, Stack
from fairseq_adaptive.ops.encoder_layer import OP, Predictor
from fairseq_adaptive.ops.registry import VARIABLE, requested

_MANY = 256  # rows for which it is worth while to lay weights out at once
_ONCE = object()  # in the place of what is made at the second call
_TYPES = (*LINEARS, Int8Linear, nn.LayerNorm, nn.Dropout, nn.GELU)


class Unfit(Exception):
    """What is in a module beside the weights that are known, in words."""


class Parts(NamedTuple):
    """What a class of layers says of itself, as ``native``.

    Attributes:
        types: classes of what is in it, beside torch's own
        activations: ``relu`` or ``gelu`` by the function
    """

    types: Tuple
    activations: Dict[Callable, str]


def native_layer(stack, depth: int, x: Tensor, demanded: bool = True):
    """Return what runs the layer of a depth over rows, or None where modules are to be called.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack`
        x: P x C
        demanded: whether it has to be there where it is asked for by name

    Raises:
        UsageError: where it is demanded and cannot be had
    """
    kept = _constants(x)
    if kept is None:
        return None
    if stack.residual is not None or stack.lora_rank:
        return _refuse("branches are not simply added, or maps differ from depth to depth", demanded)
    layer = stack[depth]
    found = _made(kept, layer, _layer, len(x), demanded)
    return None if found is None or _slower(layer.fc1, len(x)) else found


def native_layers(stack, x: Tensor) -> Optional[List]:
    """Return what runs each depth of a stack over the rows of states, ... x C, or None where modules are to be called."""
    kept = _constants(x)
    if kept is None:
        return None
    rows, found = x.flatten(0, -2), {}
    for depth, number in enumerate(stack.schedule):
        if number not in found:
            found[number] = native_layer(stack, depth, rows, demanded=False)
            if found[number] is None and kept.get((_layer, stack[depth])) is not _ONCE:
                return None
    return None if None in found.values() else [found[number] for number in stack.schedule]


def native_scores(predictor: nn.Sequential, x: Tensor) -> Optional[Tensor]:
    """Return the scores of a skim predictor, ... x C -> ... x 2, or None; raises as :func:`native_layer`."""
    kept = _constants(x)
    rows = x.numel() // max(1, x.size(-1))
    found = None if kept is None else _made(kept, predictor, _predictor, rows)
    if found is None or _slower(predictor[1], rows):
        return None
    return found(x.reshape(-1, x.size(-1))).view(*x.shape[:-1], 2)


def _constants(x: Tensor) -> Optional[Dict]:
    """What was made of constant weights, where a native call may take the place of modules."""
    kept = made_of_constants()
    if (
        kept is None
        or torch.is_grad_enabled()
        or type(x) is not Tensor
        or x.dtype != torch.float32
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()  # something watches or changes torch's operations
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or not _chosen(os.environ.get(VARIABLE))
        or any_global_hooks()
    ):
        return None
    return kept


@functools.lru_cache(maxsize=8)
def _chosen(asked: Optional[str]) -> bool:
    """Whether the operation runs here, with what the variable asks for; says so once."""
    if OP.choose("cpu", torch.float32)[0] == "native":
        return True
    OP.implementation(torch.zeros(1), torch.float32)
    return False


def _made(kept: Dict, module: nn.Module, make: Callable, rows: int, demanded: bool = True):
    """What ``make`` lays out of a module, or None; made again where something about the module is another.

    To lay a layer out takes as long as it saves in two calls with few rows: it is done at the second.
    """
    found = kept.get((make, module))
    if found is None and rows < _MANY and requested() != "native":
        kept[make, module] = _ONCE
        return None
    if found is None or found is _ONCE or not _unchanged(found[0]):
        state = _state(module)
        try:
            found = state, make(module)
        except Unfit as error:
            _refuse(str(error), demanded)
            found = state, None
        kept[make, module] = found
    return found[1]


_READ = ("eps", "apply_during_inference", "normalize_before", "activation_fn", "num_heads", "approximate")


def _state(module: nn.Module) -> List[Tuple]:
    """What tells a module from what it was before, of it and all in it; it is compared at every call."""
    found = []
    for each in module.modules():
        own = each.__dict__
        parts = dict(own["_modules"]), dict(own["_parameters"])
        tensors = [(part, part.data_ptr()) for part in parts[1].values() if part is not None]
        read = [(name, own[name]) for name in _READ if name in own]
        found.append((each, own, type(each), len(own), own["training"], _hooked(own), *parts, tensors, read))
    return found


def _hooked(own: Dict) -> bool:
    return any(map(own.__getitem__, HOOKS))


def _unchanged(state: List[Tuple]) -> bool:
    try:
        for module, own, kind, size, training, hooked, modules, parameters, tensors, read in state:
            if (
                type(module) is not kind
                or len(own) != size
                or own["training"] is not training
                or _hooked(own) is not hooked
                or own["_modules"] != modules
                or own["_parameters"] != parameters  # of the same tensors nothing is compared but their names
            ):
                return False
            for each, place in tensors:
                if each.data_ptr() != place:
                    return False
            for name, value in read:
                if own[name] is not value:
                    return False
    except (RuntimeError, TypeError):  # two tensors are neither equal nor not
        return False
    return True


def _refuse(why: str, demanded: bool):
    """Call modules.

    Raises:
        UsageError: where a native call is demanded and asked for by name
    """
    if demanded and requested() == "native":
        raise UsageError(f"{VARIABLE}=native, but {OP.name} cannot use it here: {why}")
    say_once("native encoder layers", why)


def _slower(linear: nn.Linear, rows: int) -> bool:
    from fairseq_adaptive.ops.encoder_layer.native import slower

    if requested() == "native":
        return False
    return slower(linear.in_features, linear.out_features, rows, torch.get_num_threads(), type(linear) is Int8Linear)


def _check(module: nn.Module, types: Tuple):
    why = first_change(module.modules(), types)
    if why is not None:
        raise Unfit(why)
    for each in module.modules():
        if each.training or getattr(each, "apply_during_inference", False):
            raise Unfit(f"{type(each).__name__} is in training, or drops in inference")
    for each in module.parameters():
        if type(each) is not nn.Parameter or each.dtype != torch.float32 or not each.is_cpu:
            raise Unfit("weights are not all float32 on the CPU")


def _norm(norm: nn.LayerNorm) -> Norm:
    if norm.weight is None or norm.bias is None:
        raise Unfit("a norm has no weights")
    return Norm(norm.weight, norm.bias, norm.eps)


def _map(kind, *linears: nn.Linear):
    biases = [each.bias for each in linears if each.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise Unfit("some maps of attention have no bias")
    return kind(torch.cat([each.weight for each in linears]), torch.cat(biases) if biases else None)


def _kind(*linears: nn.Linear):
    """Int8Map or Map, for all of some maps."""
    small = {type(each) is Int8Linear for each in linears}
    if len(small) > 1:
        raise Unfit("some maps are in int8, and some are not")
    return Int8Map if small.pop() else Map


def _check_small(*sizes: int):
    from fairseq_adaptive.ops.encoder_layer.native import small_obstacle

    why = small_obstacle(*sizes)
    if why is not None:
        raise Unfit(why)


def _layer(layer: nn.Module):
    parts = getattr(type(layer), "native", None)
    if parts is None:
        raise Unfit(f"{type(layer).__name__} has no native form")
    _check(layer, (*_TYPES, *parts.types))
    attention = layer.self_attn
    if getattr(layer, "tape_ffn", None) is not None or any(
        getattr(attention, name, None) for name in ("use_xformers", "add_zero_attn")
    ):
        raise Unfit("its layers are not plain")
    if getattr(attention, "bias_k", None) is not None or layer.activation_fn not in parts.activations:
        raise Unfit("keys have a bias, or the activation is not known")
    inner = attention.q_proj, attention.k_proj, attention.v_proj
    kind = _kind(*inner, attention.out_proj, layer.fc1, layer.fc2)
    maps = _map(kind, *inner), _map(kind, attention.out_proj), _map(kind, layer.fc1), _map(kind, layer.fc2)
    if kind is Int8Map:
        _check_small(attention.head_dim, layer.fc1.in_features, layer.fc1.out_features)
    norms = _norm(layer.self_attn_layer_norm), None, _norm(layer.final_layer_norm)
    activation = parts.activations[layer.activation_fn]
    stack = Stack([Layer(norms, *maps)], [0], attention.num_heads, layer.normalize_before, activation)
    from fairseq_adaptive.ops.encoder_layer.native import PackedLayer  # loads the library

    return PackedLayer(stack)


def _predictor(predictor: nn.Sequential):
    _check(predictor, (*_TYPES, type(predictor)))
    first, hidden, second, activation, score = predictor
    if activation.approximate != "none" or _kind(score) is Int8Map:
        raise Unfit("the predictor is another")
    kind = _kind(hidden)
    if kind is Int8Map:
        _check_small(hidden.in_features)
    from fairseq_adaptive.ops.encoder_layer.native import PackedPredictor  # loads the library

    return PackedPredictor(Predictor(_norm(first), _map(kind, hidden), _norm(second), _map(Map, score)))
