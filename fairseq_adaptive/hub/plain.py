"""Models of the families in plain torch: what they are made of, and how they come from a folder without fairseq."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from fairseq_adaptive.data.words import Words
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.folder import Origin, read_config, read_weights
from fairseq_adaptive.modules.layers.plain_layer import ACTIVATIONS
from fairseq_adaptive.modules.plain_encoder import ClassificationHead, EncoderDescription, PlainClassifier, PlainEncoder
from fairseq_adaptive.ranges import Range

SAME = 1e-6  # of the largest output: what plain torch may differ by, in fp32 from another order of sums
HEADS = "classification_heads"


def describe(model: nn.Module, origin: Origin) -> Tuple[Optional[Dict[str, Any]], Optional[str]]:
    """What plain torch makes of a model: ``encoder``, ``prefix`` of its weights, and ``head`` or None; or None, and why.

    Args:
        model: fairseq's, or a plain one
        origin: of it
    """
    kept = getattr(model, "described", None)
    if kept is not None:
        return kept, None
    try:
        about, prefix = _describe_encoder(model)
        head = _describe_head(model, origin) if origin.task == "sentence_prediction" else None
    except UsageError as error:
        return None, str(error)
    if head is None and origin.task != "translation":
        return None, f"--task {origin.task} has no class of plain torch"
    return {"encoder": asdict(about), "prefix": prefix, "head": head}, None


def _describe_encoder(model) -> Tuple[EncoderDescription, str]:
    name = getattr(type(model), "__name__", "")
    if name == "SharedTransformerModel":
        return _of_transformer(model.encoder), "encoder."
    if name == "TranskimmerModel":
        encoder = model.encoder.sentence_encoder
        about = _of_transformer(encoder)
        about.segments = 0 if encoder.embed_segments is None else encoder.embed_segments.num_embeddings
        about.segments_after_separator, about.separator = True, encoder.separator
        about.protect_first, about.protect_separators = True, bool(encoder.protect_separators)
        about.policy_eps = model.encoder.args.layer_norm_eps
        about.max_positions, about.without_padding = int(model.encoder.args.max_positions), True
        if about.positions == "learned":
            about.max_positions = encoder.embed_positions.num_embeddings - about.padding - 1
        return about, "encoder.sentence_encoder."
    if name == "AlbertActModel":
        return _of_albert(model.encoder, model.args), "encoder."
    raise UsageError(f"{name} has layers, memories or inputs that are not built in plain torch")


def _of_transformer(encoder) -> EncoderDescription:
    cfg, layer = encoder.cfg, encoder.layers[0]
    if getattr(encoder, "quant_noise", None) is not None or getattr(encoder, "project_in_dim", None) is not None:
        raise UsageError("its embeddings have a projection that is not built in plain torch")
    positions, rows = encoder.embed_positions, encoder.max_source_positions
    kind = "none" if positions is None else "learned" if hasattr(positions, "num_embeddings") else "sinusoidal"
    return EncoderDescription(
        positions=kind,
        max_positions=int(rows),
        scale=float(encoder.embed_scale),
        embedding_norm=encoder.layernorm_embedding is not None,
        embedding_eps=getattr(encoder.layernorm_embedding, "eps", 1e-5),
        final_norm=encoder.layer_norm is not None,
        activation_fn=_activation(cfg.activation_fn),
        normalize_before=bool(layer.normalize_before),
        admin=encoder.layers.residual is not None,
        **_common(encoder, layer, cfg.encoder.attention_heads),
        **cfg.encoder.policies.description(),
    )


def _of_albert(encoder, args) -> EncoderDescription:
    layer = encoder.layers[0]
    if encoder.policies.halting == "margin":
        raise UsageError("--halting margin reads scores of words, which plain torch does not compute")
    return EncoderDescription(
        input_dim=encoder.embed_tokens.embedding_dim,
        positions="from_zero",
        max_positions=encoder.embed_positions.num_embeddings,
        segments=2,
        embedding_norm=True,
        embedding_eps=encoder.layernorm_embedding.eps,
        activation_fn=_activation(args.activation_fn),
        protect_first=True,
        **_common(encoder, layer, args.encoder_attention_heads),
        **encoder.policies.description(),
    )


def _common(encoder, layer, heads) -> Dict[str, Any]:
    return {
        "vocabulary": encoder.embed_tokens.num_embeddings,
        "dim": int(layer.embed_dim),
        "ffn_dim": int(layer.fc1.out_features),
        "heads": int(heads),
        "schedule": encoder.layers.schedule,
        "padding": int(encoder.padding_idx),
        "eps": layer.final_layer_norm.eps,
        "lora_rank": encoder.layers.lora_rank,
    }


def _activation(name) -> str:
    name = str(name)
    if name not in ACTIVATIONS:
        raise UsageError(f"--activation-fn {name} is not built in plain torch")
    return name


def _describe_head(model, origin) -> Dict[str, Any]:
    name = origin.flags["task"].get("classification_head_name") or origin.flags["criterion"].get(
        "classification_head_name"
    )
    name = str(name or "sentence_classification_head")
    head = getattr(model, HEADS, {})
    if name not in head:
        raise UsageError(f"the model has no classification head {name}")
    head, names = head[name], ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    if sorted(head.state_dict()) != sorted(names):
        raise UsageError("its classification head has parameters that are not built in plain torch")
    activation = _activation(getattr(model.args, "pooler_activation_fn", "tanh"))
    sizes = {"inner_dim": head.dense.out_features, "classes": head.out_proj.out_features}
    return {"name": name, "activation_fn": activation, **sizes}


def build(plain: Dict[str, Any]) -> nn.Module:
    """The encoder of a description, or the classifier where it has a head.

    Raises:
        UsageError: for a description that makes no model
    """
    if not isinstance(plain.get("encoder"), dict) or not isinstance(plain.get("prefix"), str):
        raise UsageError("the description of the encoder is damaged")
    encoder, head = PlainEncoder(EncoderDescription.read(plain["encoder"])), plain.get("head")
    if head is None:
        return encoder
    for name in ("inner_dim", "classes"):
        Range(int, 1, 1 << 24).check(head.get(name), f"{name} of the classification head")
    made = ClassificationHead(encoder.about.dim, head["inner_dim"], head["classes"], head.get("activation_fn", "tanh"))
    return PlainClassifier(encoder, made)


def load_plain(folder) -> Tuple[nn.Module, Dict[str, Any]]:
    """The plain model of a folder of ``save_pretrained``, and its ``config.json``.

    Raises:
        UsageError: where the model is none of those that are built in plain torch, by name, and for what is damaged
    """
    config = read_config(folder)
    plain = config.get("plain")
    if not isinstance(plain, dict):
        raise UsageError(
            f"{folder} has a model of {config['architecture']} for {config['task']}, which needs fairseq: "
            f"{config.get('needs_fairseq')}. Without fairseq classifiers of transkimmer and albert_act load, and encoders "
            "of shared_transformer"
        )
    model, weights = build(plain), read_weights(folder, config)
    _fill_parts(model, plain, weights, folder)
    model.described, model.tied = plain, config["tied"]
    have = named_state(model)
    model.rest = {name: each for name, each in weights.items() if name not in have and name not in model.tied}
    return model.eval(), config


def named_state(model: nn.Module) -> Dict[str, Tensor]:
    """The weights of a model under the names that fairseq's has, with those that plain torch has no use for."""
    plain = getattr(model, "described", None)
    if plain is None:
        return model.state_dict()
    parts = [(plain["prefix"], getattr(model, "encoder", model))]
    if plain["head"] is not None:
        parts.append((f"{HEADS}.{plain['head']['name']}.", model.head))
    state = {prefix + name: each for prefix, part in parts for name, each in part.state_dict().items()}
    state.update(getattr(model, "rest", {}))
    state.update({name: state[other] for name, other in model.tied.items() if other in state})
    return state


def load_state(plain: Dict[str, Any], model: nn.Module) -> nn.Module:
    """The plain model of a description with the weights of a model, which may have more than is described."""
    made = build(plain)
    _fill_parts(made, plain, {name: each.cpu() for name, each in named_state(model).items()}, "the model")
    return made


def _fill_parts(model, plain, weights, folder):
    parts = [(plain["prefix"], getattr(model, "encoder", model))]
    if plain.get("head") is not None:
        parts.append((f"{HEADS}.{plain['head']['name']}.", model.head))
    for start, part in parts:
        _fill(
            part, {name.removeprefix(start): each for name, each in weights.items() if name.startswith(start)}, folder
        )


def _fill(module, weights, folder):
    """Load what a module has; fairseq's has buffers and heads besides."""
    try:
        missing, _ = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UsageError(
            f"the weights in {folder} do not fit its config.json: {' '.join(str(error).split())[:200]}"
        ) from None
    if missing:
        raise UsageError(f"the weights in {folder} lack {', '.join(missing)[:200]}")


@torch.no_grad()
def verify(folder, model: nn.Module) -> None:
    """Compare what plain torch makes of a folder with the model that was saved in it, on a short text.

    Raises:
        UsageError: where they differ by more than rounding
    """
    plain, config = load_plain(folder)
    about = getattr(plain, "encoder", plain).about
    length, words = min(9, about.max_positions), about.vocabulary
    tokens = torch.arange(2 * length).view(2, length) * 7 % max(1, words - 4) + 4
    tokens[1, length // 2 + 1 :], tokens[0, -1] = about.padding, about.separator
    device, training = next(model.parameters()).device, model.training
    model.eval()
    head = config["plain"]["head"]
    if head is None:
        expected = model.encoder(tokens.to(device), src_lengths=tokens.ne(about.padding).sum(1).to(device))
        expected = expected["encoder_out"][0].transpose(0, 1)[:, :length]
        there = tokens.ne(about.padding)
        found, expected = plain(tokens)[there], expected.cpu()[there]
    else:
        found = plain(tokens)[0]
        expected = model(tokens.to(device), features_only=True, classification_head_name=head["name"])[0].cpu()
    model.train(training)
    apart = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1))
    if not apart <= 10 * SAME:
        raise UsageError(f"plain torch does not compute what the model does, by {apart:.1e}: it cannot be saved for it")


def plain_task(folder, config: Dict[str, Any]):
    """What stands for fairseq's task of sentence prediction: its dictionaries, and the flags that are read."""
    flags = config["flags"].get("task", {})
    names = ("regression_target", "num_classes", "init_token", "separator_token", "source_lang", "target_lang")
    cfg = SimpleNamespace(**{name: flags.get(name) for name in names})
    task = SimpleNamespace(cfg=cfg)
    if config["task"] == "translation":
        task.source_dictionary = Words.read(f"{folder}/dict.{cfg.source_lang}.txt")
        task.target_dictionary = Words.read(f"{folder}/dict.{cfg.target_lang}.txt")
        return task
    cfg.classification_head_name = config["plain"]["head"]["name"]
    task.source_dictionary = Words.read(f"{folder}/input0/dict.txt", ["<mask>"])
    if not cfg.regression_target:
        task.label_dictionary = Words.read(f"{folder}/label/dict.txt")
    return task
