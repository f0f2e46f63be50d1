"""What the C file declares: its structures and the signatures of its functions."""

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p


def structure(name, **fields):
    """A structure of the C file: its fields in their order."""
    return type(name, (Structure,), {"_fields_": list(fields.items())})


Map = structure("Map", **dict.fromkeys("panels bias small scale sums".split(), c_void_p), inner=c_int32, outer=c_int32)
Norm = structure("Norm", gain=c_void_p, bias=c_void_p, eps=c_float)
MAPS = ("qkv", "merge", "query", "source", "merge_source", "up", "down")
Layer = structure("Layer", norms=Norm * 3, **dict.fromkeys(MAPS, Map))
_SIZES = "real width heads head hidden depths sublayers pre_norm gelu cross".split()
Stack = structure(
    "Stack",
    **dict.fromkeys(_SIZES, c_int32),
    scale=c_float,
    schedule=c_void_p,
    layers=POINTER(Layer),
    omega=c_void_p,
    last=Norm,
)
Decoder = structure(
    "Decoder",
    stack=Stack,
    embedding=c_void_p,
    embed_scale=c_float,
    embed_norm=Norm,
    words=Map,
    unit=c_void_p,
    unit_bias=c_float,
    threshold=c_float,
    rule=c_int32,
    layers=c_int32,
    vocabulary=c_int32,
)
Step = structure(
    "Step",
    tokens=c_void_p,
    scores=c_void_p,
    position=c_void_p,
    rows=c_int64,
    count=c_int64,
    only=c_int64,
    changes=c_int64,
    changed=c_void_p,
    change=c_void_p,
    heat=c_float,
    best=c_void_p,
    words=c_void_p,
    origin=c_void_p,
)
Round = structure(
    "Round",
    **dict.fromkeys("exit width limit room least most end drafted changes short_changes".split(), c_int64),
    **dict.fromkeys("changed short_changed change short_change positions".split(), c_void_p),
    heat=c_float,
    **dict.fromkeys("sentence place newest score rows got rounds tried given words scores".split(), c_void_p),
)
SIGNATURES = {
    "lanes": (c_int32,),
    "panel_width": (c_int32,),
    "group_width": (c_int32,),
    "small_depth": (c_int32,),
    "small_widest": (c_int32,),
    "packed_size": (c_int64, c_int64, c_int64),
    "pack": (None, c_void_p, c_int64, c_int64, c_void_p),
    "linear": (None, POINTER(Map), c_void_p, c_int64, c_void_p),
    "encode": (c_int32, POINTER(Stack), c_void_p, c_void_p, c_int64),
    "search_open": (c_void_p, POINTER(Decoder), c_void_p, c_int64),
    "search_close": (None, c_void_p),
    "search_source": (None, c_void_p, c_void_p, c_int64, c_int64),
    "search_turn": (c_int32, c_void_p, c_void_p, c_int64),
    "search_step": (c_int32, c_void_p, POINTER(Step), c_int64, c_int64),
    "search_room": (c_int32, c_void_p, c_int64, c_int64),
    "search_rounds": (c_int32, c_void_p, POINTER(Round), c_int64, c_int64),
}
