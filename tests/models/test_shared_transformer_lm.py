import pytest
import torch
from fairseq.data import Dictionary

from fairseq_adaptive.errors import UsageError

TINY = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2, "decoder_layers": 5}
TINY.update(decoder_input_dim=16, decoder_output_dim=16)
ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": "20,30",
    "adaptive_softmax_cutoff": "20,30",
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
}

NORMFORMER = {"scale_fc": True, "scale_attn": True, "scale_heads": True, "scale_resids": True}


@pytest.fixture
def tokens(batch):
    return batch["src_tokens"].flip(1)


@pytest.mark.parametrize("options", [{}, ADAPTIVE, NORMFORMER], ids=("plain", "adaptive", "normformer"))
def test_equals_fairseq_when_nothing_is_shared(build, tokens, options):
    ours = build("shared_transformer_lm_base", decoder_unique_layers=5, **TINY, **options)
    stock = build("transformer_lm_gpt", activation_fn="relu", attention_dropout=0.0, **TINY, **options)
    assert set(ours.state_dict()) == set(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(tokens)[0], stock(tokens)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", ("sequence", "cycle", "cycle_rev"))
@pytest.mark.parametrize("options", [{}, ADAPTIVE], ids=("plain", "adaptive"))
def test_incremental_equals_full(build, tokens, strategy, options):
    model = build("shared_transformer_lm_base", layer_sharing=strategy, decoder_unique_layers=2, **TINY, **options)
    tokens = tokens.masked_fill(tokens == 1, 9)
    state = {}
    with torch.no_grad():
        steps = [model(tokens[:, : n + 1], incremental_state=state)[0][:, -1] for n in range(tokens.size(1))]
        torch.testing.assert_close(torch.stack(steps, 1), model(tokens)[0], rtol=0, atol=1e-6)


def test_wikitext103_has_the_published_size(build):
    """121M parameters with the 267,744 words of WikiText-103 (Takase and Kiyono, 2021); built on meta tensors."""
    words = Dictionary()
    for number in range(len(words), 267_744):
        words.add_symbol(str(number))
    with torch.device("meta"):
        model = build("shared_transformer_lm_wikitext103", words=words, tokens_per_sample=512)
    assert model.decoder.layers.schedule == (0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 121


def test_refuses_impossible_flags(build):
    with pytest.raises(UsageError, match="6 unique layers cannot serve 5 depths"):
        build("shared_transformer_lm_base", decoder_unique_layers=6, **TINY)
    with pytest.raises(UsageError, match="post-LN"):
        build("shared_transformer_lm_base", init="admin", **TINY)
