"""Small models of every family, what they are asked, and what they answer.

``python tests/old_checkpoints/cases.py`` wrote the files of this folder with the code of commit aa13b37; later code must
load them and answer the same. They are not to be written again.
"""

import argparse
import dataclasses
import io
import lzma
from pathlib import Path
from types import SimpleNamespace

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

import fairseq_adaptive.plugin  # noqa: F401  registers models
from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory

FOLDER = Path(__file__).parent
_ENCODER = {"encoder_embed_dim": 8, "encoder_ffn_embed_dim": 12, "encoder_attention_heads": 2}
_DECODER = {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 12, "decoder_attention_heads": 2}
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_PAIRS = {
    **_ENCODER,
    **_DECODER,
    **_NO_DROPOUT,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "share_all_embeddings": True,
    "encoder_unique_layers": 2,
    "decoder_unique_layers": 2,
}
_LM = {
    **_DECODER,
    **_NO_DROPOUT,
    "decoder_layers": 4,
    "decoder_unique_layers": 2,
    "decoder_input_dim": 8,
    "decoder_output_dim": 8,
    "share_decoder_input_output_embed": True,
}
_ALBERT = {**_ENCODER, **_NO_DROPOUT, "pooler_dropout": 0.0, "encoder_input_dim": 6, "encoder_layers": 4}
_ROBERTA = {**_ENCODER, **_NO_DROPOUT, "encoder_layers": 3, "max_positions": 20}
_TAPE = {
    **_ENCODER,
    **_NO_DROPOUT,
    "encoder_layers": 3,
    "tape_tokens": 4,
    "tape_threshold": 2.0,
    "tape_mlp_dim": 8,
    "tape_ffn_embed_dim": 8,
}
_SEGMENTS = {**_DECODER, "dropout": 0.0, "attention_dropout": 0.0, "memory_length": 5}

CASES = {
    "shared_transformer": ("shared_transformer", _PAIRS),
    "shared_transformer_admin": ("shared_transformer", {**_PAIRS, "init": "admin", "layer_sharing": "sequence"}),
    "translation_act": ("shared_transformer", {**_PAIRS, "halting": "act"}),
    "translation_ut_act": (
        "shared_transformer",
        {**_PAIRS, "halting": "ut_act", "encoder_normalize_before": True, "decoder_normalize_before": True},
    ),
    "translation_pondernet": ("shared_transformer", {**_PAIRS, "halting": "pondernet"}),
    "translation_saturation": ("shared_transformer", {**_PAIRS, "halting": "saturation", "halting_threshold": 0.9}),
    "translation_margin": ("shared_transformer", {**_PAIRS, "decoder_halting": "margin", "halting_threshold": 0.05}),
    "shared_transformer_lm": ("shared_transformer_lm", _LM),
    "shared_transformer_lm_act": ("shared_transformer_lm", {**_LM, "halting": "act", "decoder_normalize_before": True}),
    "albert_act": ("albert_act", _ALBERT),
    "albert_act_pondernet": ("albert_act", {**_ALBERT, "halting": "pondernet"}),
    "transkimmer": ("transkimmer", {**_ROBERTA, "token_types": 2}),
    "transkimmer_dense": ("transkimmer", {**_ROBERTA, "no_skimming": True}),
    "adatape": ("adatape", {**_ROBERTA, **_TAPE, "tape_bank_size": 20}),
    "adatape_act": ("adatape", {**_ROBERTA, **_TAPE, "tape_bank_size": 20, "halting": "act"}),
    "adatape_skimming": ("adatape", {**_ROBERTA, **_TAPE, "tape_bank_size": 20, "skimming": True, "skim_bias": 0.0}),
    "adatape_parity": ("adatape_parity", _TAPE),
    "adatape_parity_ut_act": ("adatape_parity", {**_TAPE, "halting": "ut_act", "encoder_unique_layers": 1}),
    "adatape_vit": ("adatape_vit", {**_TAPE, "patch_size": 4, "tape_bank_patch_size": 2, "tape_layer": 2}),
    "adatape_vit_class": (
        "adatape_vit",
        {**_TAPE, "patch_size": 4, "tape_bank_patch_size": 2, "read_out": "class", "tape_query": "first"},
    ),
    "par_transformer_xl": ("par_transformer_xl", {**_SEGMENTS, "layout": "aff*2"}),
    "par_transformer_xl_adaptive": (
        "par_transformer_xl",
        {
            **_SEGMENTS,
            "layout": "af*2",
            "adaptive_softmax_cutoff": "10,20",
            "share_decoder_input_output_embed": True,
            "decoder_normalize_before": True,
            "same_length": True,
        },
    ),
    "par_supernet": ("par_supernet", {**_SEGMENTS, "blocks": 3, "temperature_updates": 100}),
    "par_supernet_paths": (
        "par_supernet",
        {**_SEGMENTS, "blocks": 3, "temperature_updates": 100, "sample_paths": True},
    ),
}


def load(name):
    return torch.load(io.BytesIO(lzma.decompress((FOLDER / f"{name}.pt.xz").read_bytes())))


def task():
    words = Dictionary()
    for number in range(30):
        words.add_symbol(f"word{number}", n=100 - number)
    words.finalize()
    return SimpleNamespace(
        source_dictionary=words,
        target_dictionary=words,
        src_dict=words,
        tgt_dict=words,
        dictionary=words,
        cfg=SimpleNamespace(sequence_length=12),
        image_size=(8, 8),
        channels=1,
        classes=range(3),
        max_positions=lambda: 20,
    )


def flags_of(arch, flags):
    """All flags of a model, as fairseq puts them into a checkpoint."""
    model_class = ARCH_MODEL_REGISTRY[arch]
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    model_class.add_args(parser)
    args = parser.parse_args([])
    defaults = {"max_source_positions": 20, "max_target_positions": 20, "tokens_per_sample": 20, "_name": arch}
    for name, value in {**defaults, **flags}.items():
        setattr(args, name, value)
    if arch in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[arch](args)
    config = getattr(model_class, "__dataclass", None)
    for field in dataclasses.fields(config) if config else ():
        if not hasattr(args, field.name):
            setattr(args, field.name, field.default)
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}


def build(arch, flags):
    return ARCH_MODEL_REGISTRY[arch].build_model(argparse.Namespace(**flags), task())


def _words(batch, length, lengths=()):
    tokens = torch.randint(4, 34, (batch, length))
    for row, each in enumerate(lengths):
        tokens[row, each - 1], tokens[row, each:] = 2, 1
    return tokens


def inputs(arch):
    torch.manual_seed(11)
    if arch == "shared_transformer":
        return {
            "src_tokens": _words(3, 8, (8, 5, 3)),
            "src_lengths": torch.tensor([8, 5, 3]),
            "prev_output_tokens": _words(3, 7, (4, 7, 6)),
        }
    if arch in ("shared_transformer_lm", "par_transformer_xl", "par_supernet"):
        return {"src_tokens": _words(3, 9)}
    if arch == "adatape_parity":
        return {"elements": torch.randint(0, 3, (4, 12))}
    if arch == "adatape_vit":
        return {"image": torch.randn(4, 1, 8, 8)}
    return {"src_tokens": _words(3, 12, (12, 7, 9))}


def _net_output(model, arch, given):
    if not arch.startswith("par_"):
        return model(**given)[0]
    memory = SegmentMemory()
    return torch.cat([model(part, memory=memory)[0] for part in given["src_tokens"].split((4, 3, 2), 1)], 1)


def answers(model, arch, given):
    """Of a model in float64: in evaluation with and without gradients, in training, and in generation; float32."""
    model, found = model.double().eval(), {}
    with torch.no_grad():
        found["evaluation"] = _net_output(model, arch, given)
        if arch == "par_transformer_xl":
            state, tokens = {}, given["src_tokens"]
            steps = [model.decoder(tokens[:, : end + 1], incremental_state=state)[0] for end in range(tokens.size(1))]
            found["steps"] = torch.cat(steps, 1)
    found["with gradients"] = _net_output(model, arch, given).detach()
    torch.manual_seed(12)
    out = _net_output(model.train(), arch, given)
    found["training"] = out.detach()
    model.zero_grad()
    out.sin().sum().backward()
    found["gradients"] = torch.stack(
        [each.grad.norm() for _, each in sorted(model.named_parameters()) if each.grad is not None]
    )
    model.eval()
    if arch.startswith("shared_transformer"):
        words = task().target_dictionary
        net_input = (
            given
            if arch == "shared_transformer"
            else {"src_tokens": given["src_tokens"][:, :3], "src_lengths": torch.full((3,), 3)}
        )
        generator = BeamGenerator([model], words, beam_size=2, max_len_b=10, max_len=10)
        best = [each[0] for each in generator.generate([model], {"net_input": net_input})]
        found["hypotheses"] = torch.cat([each["tokens"] for each in best])
        found["scores"] = torch.stack([each["score"] for each in best])
    return {name: each.float() if each.is_floating_point() else each for name, each in found.items()}


def unsettle(model):
    """Weights with which tokens stop at all depths, tapes have several lengths, and kinds are undecided."""
    torch.manual_seed(13)
    for name, each in model.named_parameters():
        if name.endswith("halting.unit.bias"):
            each.data.fill_(-0.8)
        elif name.endswith("tape.reader.norm.weight"):
            each.data.normal_(1.0, 0.5)
        elif ".router." in name and name.endswith(".4.bias"):
            each.data.zero_()
        elif "halting.unit" in name or ".router." in name:
            each.data.normal_(0.0, 0.7)
        else:
            each.data += 0.2 * torch.randn_like(each)
    return model


if __name__ == "__main__":
    for name, (arch, flags) in CASES.items():
        torch.manual_seed(1)
        flags = flags_of(arch, flags)
        model = unsettle(build(arch, dict(flags)))
        given = inputs(arch)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        file = io.BytesIO()
        torch.save(
            {"arch": arch, "flags": flags, "weights": weights, "inputs": given, "answers": answers(model, arch, given)},
            file,
        )
        (FOLDER / f"{name}.pt.xz").write_bytes(lzma.compress(file.getvalue()))
