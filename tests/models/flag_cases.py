"""Another value of every flag of every family, what a flag needs to change something, and what a model is and answers.

Models are those of :data:`models.test_policy_flags.FAMILIES`.
"""

from types import SimpleNamespace

import torch
from fairseq.models.roberta import RobertaModel
from fairseq.modules import AdaptiveSoftmax as FairseqAdaptiveSoftmax
from fairseq.quantization_utils import quantize_model_scalar
from models.test_policy_flags import FAMILIES
from old_checkpoints.cases import build, flags_of, inputs, task, unsettle

from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory

BASE = {family: dict(flags) for family, flags in FAMILIES.items()}
BASE["shared_transformer"]["share_all_embeddings"] = False
SIDES, TAPES = ("encoder", "decoder"), ("adatape", "adatape_parity", "adatape_vit")
SEGMENTED = ("par_transformer_xl", "par_supernet")

_POLICIES = {
    "halting": "ut_act",
    "halting_args": '{"bias": -2}',
    "halting_kv": "active",
    "halting_threshold": 0.5,
    "exit_quantile": 0.5,
    "router": "mixture_of_depths",
    "router_args": '{"bias": 1.0}',
    "router_kv": "recompute",
}
_OF_A_SIDE = {
    "attention_heads": 4,
    "embed_dim": 12,
    "ffn_embed_dim": 10,
    "layerdrop": 0.8,
    "layers": 4,
    "layers_to_keep": "0,1",
    "unique_layers": 1,
    "xformers_att_config": '{"name": "scaled_dot_product"}',
    **_POLICIES,
}
_DROPOUTS = "dropout attention_dropout activation_dropout relu_dropout pooler_dropout adaptive_softmax_dropout"
# of a flag, or of a flag in a family; switches are turned
VALUES = {
    **{f"{side}_{name}": value for side in SIDES for name, value in _OF_A_SIDE.items()},
    **_POLICIES,
    **{f"{side}reader": "tape" for side in ("", "encoder_")},
    **{f"{side}reader_args": '{"tokens": 4, "bank_size": 20, "depth": 1}' for side in ("", "encoder_")},
    **dict.fromkeys(_DROPOUTS.split(), 0.3),
    "activation_fn": "tanh",
    "adaptive_input_cutoff": "8,20",
    "adaptive_input_factor": 1.0,
    "adaptive_softmax_cutoff": "10,20",
    "adaptive_softmax_factor": 2.0,
    "alignment_heads": 1,
    "alignment_layer": 0,
    "base_layers": 1,
    "base_shuffle": 0,
    "base_sublayers": 2,
    "blocks": 2,
    "char_embedder_highway_layers": 1,
    "character_embedding_dim": 5,
    "character_filters": "[(1, 6)]",
    "clamp_length": 2,
    "decoder_head_dim": 3,
    "decoder_input_dim": 5,
    "encoder_input_dim": 5,
    "decoder_output_dim": 6,
    "depth_lora_rank": 2,
    "ffn_blocks_to_remove": 1,
    "ffn_reg_scale_factor": 0.1,
    "halting_after": "f",
    "init": "admin",
    "init_std": 0.3,
    "layer_norm_eps": 1e-2,
    "layer_sharing": "sequence",
    "layerdrop_by_depth": "exponential",
    "layerdrop_warmup_updates": 10,
    "layout": "aff",
    "max_positions": 15,
    "max_source_positions": 15,
    "max_target_positions": 15,
    "memory_length": 3,
    "mha_heads_to_keep": 1,
    "mha_reg_scale_factor": 0.1,
    "min_params_to_wrap": 5,
    "patch_size": 2,
    "pooler_activation_fn": "relu",
    "quant_noise_pq": 0.3,
    "quant_noise_pq_block_size": 2,
    "quant_noise_scalar": 0.3,
    "read_out": "class",
    "skim_bias": 1.0,
    "skim_noise": 0.5,
    "tape_bank": "learned",
    "tape_bank_dropout": 0.5,
    "tape_bank_patch_size": 1,
    "tape_bank_size": 25,
    "tape_cost": "max",
    "tape_ffn_embed_dim": 5,
    "tape_key_dim": 3,
    "tape_layer": 2,
    "tape_mlp_dim": 5,
    "tape_query": "first",
    "tape_query_noise": 0.5,
    "tape_query_update": "replace",
    "tape_threshold": 3.0,
    "tape_tokens": 3,
    "temperature_end": 0.5,
    "temperature_start": 2.0,
    "temperature_updates": 20,
    "token_types": 2,
    ("albert_act", "encoder_layers"): 1,
    ("par_transformer_xl", "decoder_unique_layers"): 2,
}

_CUTOFFS = {"adaptive_softmax_cutoff": "10,20", "adaptive_softmax_factor": 4.0, "decoder_output_dim": 16}
_ADAPTIVE = {"adaptive_input": True, "adaptive_input_cutoff": "10,20", "decoder_input_dim": 16}
_BOTH_ADAPTIVE = {**_CUTOFFS, **_ADAPTIVE, "adaptive_input_factor": 4.0, "decoder_embed_dim": 16}
_CHARACTERS = {"character_embeddings": True, "character_filters": "[(1, 8)]"}
_SHARED = {f"{side}_{name}": value for side in SIDES for name, value in {"layers": 4, "unique_layers": 2}.items()}
# what a flag, or a flag in a family, needs to change something
CONTEXTS = {
    **{
        f"{start}{kind}_{name}": {f"{start}{kind}": policy}
        for start in ("", "encoder_", "decoder_")
        for kind, names, policy in (
            ("halting", ("args", "kv", "threshold"), "act"),
            ("router", ("args", "kv"), "skimming"),
        )
        for name in names
    },
    **{f"{side}exit_quantile": {f"{side}halting": "act"} for side in ("", "encoder_", "decoder_")},
    **{f"{side}reader_args": {f"{side}reader": "tape"} for side in ("", "encoder_")},
    **{("albert_act", f"halting_{name}"): {} for name in ("args", "kv", "threshold")},
    ("albert_act", "exit_quantile"): {},
    **{("transkimmer", f"router_{name}"): {} for name in ("args", "kv")},
    "adaptive_input": {"adaptive_input_cutoff": "10,20", "decoder_input_dim": 16},
    "adaptive_input_cutoff": _ADAPTIVE,
    "adaptive_input_factor": _ADAPTIVE,
    "adaptive_softmax_cutoff": {"decoder_output_dim": 16},
    "adaptive_softmax_dropout": _CUTOFFS,
    "adaptive_softmax_factor": _CUTOFFS,
    **{("par_transformer_xl", f"adaptive_softmax_{name}"): {} for name in ("cutoff", "factor")},
    **{("par_supernet", f"adaptive_softmax_{name}"): {} for name in ("cutoff", "factor")},
    **{(family, "adaptive_softmax_dropout"): {"adaptive_softmax_cutoff": "10,20"} for family in SEGMENTED},
    "tie_adaptive_weights": _BOTH_ADAPTIVE,
    "tie_adaptive_proj": {**_BOTH_ADAPTIVE, "tie_adaptive_weights": True},
    **{
        (family, "tie_adaptive_proj"): {
            "adaptive_softmax_cutoff": "10,20",
            "adaptive_softmax_factor": 2.0,
            "share_decoder_input_output_embed": True,
        }
        for family in SEGMENTED
    },
    **dict.fromkeys(("char_embedder_highway_layers", "character_embedding_dim", "character_filters"), _CHARACTERS),
    "no_decoder_final_norm": {"decoder_normalize_before": True},
    "quant_noise_pq": {"quant_noise_pq_block_size": 4},
    "quant_noise_pq_block_size": {"quant_noise_pq": 0.3, **{f"{side}_ffn_embed_dim": 16 for side in SIDES}},
    **{(family, name): _SHARED for family in ("transkimmer", *TAPES) for name in ("layer_sharing", "depth_lora_rank")},
    ("par_transformer_xl", "layer_sharing"): {"layout": "f*4", "decoder_unique_layers": 2},
    ("par_transformer_xl", "halting_after"): {"halting": "act"},
    ("transkimmer", "encoder_layerdrop"): {"no_skimming": True},
    **{(family, "skim_bias"): {"skimming": True} for family in TAPES},
    **dict.fromkeys(("layerdrop_by_depth", "layerdrop_warmup_updates"), {"decoder_layerdrop": 0.8}),
    "tape_allow_exhausted": {"tape_tokens": 20},  # refused without it
    "tape_bank_size": {"tape_bank": "learned"},
    ("adatape", "tape_bank_size"): {},
}
_NO_PRUNING = dict.fromkeys(
    ("mha_heads_to_keep", "ffn_blocks_to_remove", "mha_reg_scale_factor", "ffn_reg_scale_factor"), "not pruned here"
)
# what is refused whatever else is given, and what is said
REFUSED = {
    **{f"{side}_layers_to_keep": "a layer serves several depths" for side in SIDES},
    "base_layers": "cannot be combined with shared layers",
    "int8": "load it without int8 to train it",  # what it does in inference: models/test_int8.py
    **{("shared_transformer", name): "adaptive inputs" for name in ("adaptive_input", "tie_adaptive_weights")},
    ("shared_transformer", "tie_adaptive_proj"): "adaptive inputs",
    **{(family, "reader"): "--reader is for encoders" for family in ("shared_transformer_lm", *SEGMENTED)},
    **{(family, "reader_args"): "--reader" for family in ("shared_transformer_lm", *SEGMENTED)},
    **{(family, "quant_noise_scalar"): "learned positions" for family in ("transkimmer", "adatape")},
    **{(family, "reader_args"): "flags of its own, --tape-tokens" for family in TAPES},
    **{(family, name): said for family in ("transkimmer", "adatape") for name, said in _NO_PRUNING.items()},
    **{f"{side}_xformers_att_config": "Please install xFormers" for side in SIDES},  # fairseq says so
}
# what changes nothing whatever else is given, of which a training warns
SAID = {
    "base_shuffle": "--base-layers",
    "base_sublayers": "--base-layers",
    "char_inputs": "old checkpoints",
    ("adatape_parity", "tape_query"): "sequence of several tokens",
}
# what changes nothing here, or without its context, rightly, and why
SILENT = {
    "tape_allow_exhausted": "lets a tape be as long as one that is refused without it",
    "min_params_to_wrap": "how --ddp-backend fully_sharded divides a model among workers",
    "export": "a LayerNorm for TorchScript in the place of apex's, which only GPUs have",
    **{(family, "layernorm_embedding"): "fairseq's RoBERTa has it anyhow" for family in ("transkimmer", "adatape")},
    **{(family, "reader"): "the tape is there anyhow" for family in TAPES},
}


def lookup(table, family, name, default=None):
    """The entry of a flag in a family, or else of the flag."""
    return table.get((family, name), table.get(name, default))


def _net_output(model, family, given):
    if family not in SEGMENTED:
        return model(**given)[0]
    memory = SegmentMemory()
    return torch.cat([model(part, memory=memory)[0] for part in given["src_tokens"].split((4, 3, 2), 1)], 1)


def _word_losses(softmax, features, words):
    """Of an adaptive softmax, which a model leaves to its criterion."""
    if not isinstance(softmax, FairseqAdaptiveSoftmax):
        return softmax(features.flatten(0, 1), words.flatten())[0]
    return torch.cat([each.flatten() for each in softmax(features, words)[0] if each is not None])


def _run(model, family, given):
    """Output, losses of an adaptive softmax, and prices of policies; one seed."""
    torch.manual_seed(2)
    with recording(model) as traces:
        found = [_net_output(model, family, given)]
    softmax = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
    if softmax is not None:
        words = given.get("prev_output_tokens", given.get("src_tokens"))
        found.append(_word_losses(softmax, found[0], words))
    for each in decisions(model):
        if each.policy.kind != "search":
            found.append(torch.as_tensor(each.policy.price(traces[each.name][0])))
    return found


def _generated(model, family, given):
    if family == "shared_transformer_lm":
        given = {"src_tokens": given["src_tokens"][:, :3], "src_lengths": torch.full((3,), 3)}
    generator = BeamGenerator([model], task().target_dictionary, beam_size=2, max_len_b=10, max_len=10)
    best = [each for sentence in generator.generate([model], {"net_input": given}) for each in sentence]
    return [each[name] for each in best for name in ("positional_scores", "attention") if each[name] is not None]


def _pretrained(model, family, flags):
    """Names of the parameters of a model into which those of one with another classification head were loaded."""
    again = build(family, dict(flags))
    again.load_state_dict(model.state_dict(), strict=True)
    return sorted(again.state_dict())


def portrait(family, given):
    """What a model is, and what it answers: a dict.

    Args:
        family: of the model
        given: flags in the place of those of the family

    Raises:
        UsageError: for flags that contradict each other
    """
    flags = flags_of(family, {**BASE[family], **given})
    torch.manual_seed(1)
    model = build(family, dict(flags))
    heads, found = isinstance(model, RobertaModel), {}
    if heads:
        model.register_classification_head("head", num_classes=2)
        found["loaded"] = _pretrained(model, family, flags)
    model = quantize_model_scalar(model, SimpleNamespace(**flags))  # as fairseq's tasks do
    # fairseq's adaptive input has a buffer that nobody fills
    found["weights"] = {name: each.clone() for name, each in model.state_dict().items() if "_float_tensor" not in name}
    names = [(name, id(each)) for name, each in model.named_parameters(remove_duplicate=False)]
    found["ties"] = [[name for name, one in names if one == other] for other in {each: 0 for _, each in names}]
    found["positions"] = model.max_positions()
    unsettle(model).double().set_num_updates(3)
    asked = inputs("shared_transformer_lm" if family in SEGMENTED else family)
    asked = {name: each.double() if each.is_floating_point() else each for name, each in asked.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: (saved.append(1), each)[1], lambda each: each):
        found["training"] = _run(model.train(), family, asked)
    found["saved"] = len(saved)
    with torch.no_grad():
        found["evaluation"] = _run(model.eval(), family, asked)
        for training in (True, False) if heads else ():
            torch.manual_seed(2)
            model.train(training)
            found[f"head, {training}"] = model(**asked, classification_head_name="head", features_only=True)[0]
        if family in ("shared_transformer", "shared_transformer_lm"):
            found["generation"] = _generated(model, family, asked)
    return found


def same(one, other) -> bool:
    """Whether two portraits, or parts of them, are the same, bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
