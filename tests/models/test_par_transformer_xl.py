import pytest
import torch
from fairseq.data import Dictionary

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from fairseq_adaptive.modules.transformer_xl.relative_attention import KeyValueCache

TINY = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2, "memory_length": 64}
TINY.update(layout="afff,af", dropout=0.0)
ADAPTIVE = {"adaptive_softmax_cutoff": "10,30", "share_decoder_input_output_embed": True, "tie_adaptive_proj": True}
OPTIONS = {
    "plain": {},
    "adaptive": {**ADAPTIVE, "adaptive_softmax_factor": 2.0},
    "pre-LN": {"decoder_normalize_before": True, "untie_relative_bias": True, "share_decoder_input_output_embed": True},
    "window": {"memory_length": 5, "same_length": True, "clamp_length": 3},
}


@pytest.fixture
def tokens():
    torch.manual_seed(2)
    return torch.randint(4, 44, (3, 20))


def full_log_probs(model, tokens):
    return model.get_normalized_probs(model(tokens), log_probs=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_segments_with_memory_equal_the_whole(build, tokens, options):
    """A memory that holds all, or a window of fixed length, leaves no trace of where segments end."""
    model = build("par_transformer_xl", **{**TINY, **options})
    whole = full_log_probs(model, tokens)
    for lengths in ([7, 7, 6], [1] * 20, [19, 1]):
        caches, inputs = SegmentMemory(), SegmentMemory()
        for memory, gradients in (caches, False), (inputs, True):
            parts = []
            with torch.set_grad_enabled(gradients):
                for segment in tokens.split(lengths, dim=1):
                    parts.append(model.get_normalized_probs(model(segment, memory=memory), log_probs=True))
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
        assert all(isinstance(state, KeyValueCache) for state in (caches.states[0], caches.states[4]))
        assert [state is None for state in inputs.states] == [False, True, True, True, False, True]


def test_memory_is_cut_and_detached(build, tokens):
    model = build("par_transformer_xl", **{**TINY, "memory_length": 4}).train()
    memory = SegmentMemory()
    model(tokens, memory=memory)
    assert memory.states[0].shape == (3, 4, 16) and not memory.states[0].requires_grad
    with_memory = model(tokens, memory=memory)[0]
    assert (with_memory - model(tokens)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_incremental_equals_full_and_beams_are_reordered(build, tokens, options):
    model = build("par_transformer_xl", **{**TINY, **options})
    state, order = {}, torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        whole = full_log_probs(model, tokens)
        for end in range(1, 11):
            step = model.decoder(tokens[:, :end], incremental_state=state)
            step = model.get_normalized_probs(step, log_probs=True)
            torch.testing.assert_close(step[:, 0], whole[:, end - 1], rtol=0, atol=1e-10)
        model.decoder.reorder_incremental_state_scripting(state, order)
        step = model.decoder(tokens[order, :11], incremental_state=state)
        step = model.get_normalized_probs(step, log_probs=True)
    torch.testing.assert_close(step[:, 0], whole[order, 10], rtol=0, atol=1e-10)


def test_sees_the_past_only(build, tokens):
    model = build("par_transformer_xl", **TINY)
    changed = tokens.clone()
    changed[:, 12] = (tokens[:, 12] - 4 + 1) % 40 + 4
    difference = (model(changed)[0] - model(tokens)[0]).abs().amax(dim=(0, 2))
    assert difference[:12].max() == 0 and difference[12:].min() > 1e-6


def test_targets_get_their_probability_without_the_vocabulary(build, tokens):
    model = build("par_transformer_xl", **TINY, **ADAPTIVE)
    with torch.no_grad():
        output = model(tokens)
        whole = model.get_normalized_probs(output, log_probs=True)
        found = model.get_normalized_probs(output, log_probs=True, sample={"target": tokens.roll(-1, 1)})
    assert found.stride(-1) == 0
    gold = whole.gather(-1, tokens.roll(-1, 1).unsqueeze(-1))
    torch.testing.assert_close(found[..., :1].to(gold), gold, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(3, 20).to(whole), rtol=0, atol=1e-10)


def test_parameters_are_tied_where_asked(build):
    decoder = build("par_transformer_xl", **TINY, **{**ADAPTIVE, "adaptive_softmax_factor": 2.0}).decoder
    tables = zip(decoder.embed_tokens.tables, decoder.adaptive_softmax.tables)
    assert all(ours is theirs for ours, theirs in tables)
    tied = [a is b for a, b in zip(decoder.embed_tokens.projections, decoder.adaptive_softmax.projections)]
    assert tied == [False, True, True]
    biases = [block.attention.content_bias for block in decoder.blocks if block.kind == "a"]
    assert biases[0] is biases[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"layout": "afx"}, "character 3"),
        ({"decoder_attention_heads": 3}, "no multiple of --decoder-attention-heads"),
        ({"adaptive_softmax_cutoff": "30,10"}, "increasing numbers from 1 to 47"),
        ({"adaptive_softmax_cutoff": "10,48"}, "increasing numbers from 1 to 47"),
        ({"adaptive_softmax_cutoff": "ten"}, "comma separated list of whole numbers"),
        ({"memory_length": 0, "same_length": True}, "that cannot be 0"),
        ({"memory_length": -1}, "--memory-length is -1"),
        ({"tie_adaptive_proj": True}, "--tie-adaptive-proj needs"),
    ],
)
def test_bad_options_are_refused(build, flags, message):
    with pytest.raises(UsageError, match=message):
        build("par_transformer_xl", **{**TINY, **flags})


def test_unsorted_dictionary_is_refused_for_adaptive_softmax(build):
    words = Dictionary()
    for word, count in ("often", 5), ("rare", 2), ("more", 3):
        words.add_symbol(word, n=count)
    build("par_transformer_xl", words=words, **TINY)
    with pytest.raises(UsageError, match=r"not sorted by frequency: 'more' \(3 times\) comes after 'rare' \(2 times\)"):
        build("par_transformer_xl", words=words, **TINY, adaptive_softmax_cutoff="5")


def test_no_memory_is_a_model_of_single_segments(build, tokens):
    model = build("par_transformer_xl", **{**TINY, "memory_length": 0})
    memory = SegmentMemory()
    with torch.no_grad():
        first = model(tokens, memory=memory)[0]
        torch.testing.assert_close(model(tokens, memory=memory)[0], first, rtol=0, atol=0)
