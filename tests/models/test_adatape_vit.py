from types import SimpleNamespace

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_vit import AdaTapeViT, AdaTapeViTConfig

SMALL = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "encoder_layers": 3,
    "patch_size": 4,
    "tape_bank_patch_size": 2,
    "tape_mlp_dim": 8,
    "tape_ffn_embed_dim": 8,
    "tape_tokens": 5,
}


def build(size=(8, 8), channels=1, seed=1, arch=None, **flags):
    args = SimpleNamespace(**flags)
    if arch:
        ARCH_CONFIG_REGISTRY[arch](args)
    cfg = OmegaConf.structured(AdaTapeViTConfig(**vars(args) if arch else {**SMALL, **flags}))
    torch.manual_seed(seed)
    model = AdaTapeViT.build_model(cfg, SimpleNamespace(image_size=size, channels=channels, classes=list("abc")))
    torch.nn.init.normal_(model.output_projection.weight)
    if model.tape:
        torch.nn.init.normal_(model.tape.reader.norm.weight, 1.5)  # tapes of several lengths
    return model.double().eval()


@pytest.fixture
def image():
    torch.manual_seed(3)
    return torch.rand(12, 1, 8, 8, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("flags", ({}, {"tape_bank": "learned", "tape_bank_size": 50}, {"encoder_unique_layers": 1}))
def test_rows_and_packing(image, flags):
    model = build(**flags)
    dense, extra = model(image)
    assert extra["bank_size"] == (50 if "tape_bank" in flags else 16) and extra["bank_shared"] == ("tape_bank" in flags)
    assert len(set(extra["tape"].live.sum(1).tolist())) > 1
    with torch.no_grad():
        assert torch.allclose(model(image)[0], dense, atol=1e-12)
        for row in range(3):
            assert torch.allclose(model(image[row : row + 1])[0][0], dense[row], atol=1e-12)


def test_plain_vit_is_the_same_without_tape(image):
    plain = build(tape_tokens=0)
    assert not any("tape" in name or "bank" in name for name, _ in plain.named_parameters())
    assert plain(image)[1] == {"tape": None}


@pytest.mark.parametrize("arch", ("ti32", "ti16", "s32", "s16", "b32", "b16"))
def test_published_sizes(arch):
    with torch.device("meta"):
        from fairseq_adaptive.models.adatape_vit import SIZES

        width, ffn, heads, depth = SIZES[arch[:-2]]
        args = SimpleNamespace()
        ARCH_CONFIG_REGISTRY[f"adatape_vit_{arch}"](args)
        cfg = OmegaConf.structured(AdaTapeViTConfig(**vars(args)))
        task = SimpleNamespace(image_size=(224, 224), channels=3, classes=range(1000))
        assert ARCH_MODEL_REGISTRY[f"adatape_vit_{arch}"] is AdaTapeViT
        model = AdaTapeViT.build_model(cfg, task)
    count = (224 // int(arch[-2:])) ** 2
    assert model.embedding.count == count and model.bank_embedding.count == 4 * count
    assert len(model.layers) == depth and model.layers[0].fc1.out_features == ffn
    assert model.tape.reader.key_dim == width // heads and model.tape.reader.entries_per_token == 5
    # the public Vision Transformers have 5.7, 22.1 and 86.6 million parameters (Ti, S, B of patch 16)
    plain = {"ti": 5.7e6, "s": 22.1e6, "b": 86.6e6}[arch[:-2]]
    tape = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("tape.", "bank")))
    total = sum(p.numel() for p in model.parameters())
    assert total - tape == pytest.approx(plain, rel=0.15 if arch.endswith("32") else 0.02)


def test_small_images():
    assert build((28, 28), arch="adatape_vit_mini")(torch.rand(2, 1, 28, 28).double())[0].shape == (2, 3)


@pytest.mark.parametrize(
    "flags, message",
    (
        ({"patch_size": 3}, "--patch-size is 3, and does not divide images of 8 x 8"),
        ({"tape_bank_patch_size": 3}, "--tape-bank-patch-size is 3"),
        ({"tape_bank_patch_size": 4}, "bank of 4 entries can be exhausted by 5 tape tokens of 2"),
        ({"tape_bank": "learned", "tape_bank_size": 5}, "bank of 5 entries"),
    ),
)
def test_refuses(flags, message):
    with pytest.raises(UsageError, match=message):
        build(**flags)
