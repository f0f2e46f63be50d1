"""Shared parameters in fairseq's Transformer: same numbers as fairseq where nothing is shared, exact decoding, M layers."""

import copy

import pytest
import torch
from groups import one_worker

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import layer_schedule

# fairseq's attention computes its softmax in float32 wherever it keeps a cache, so float64 models agree to 1e-6 only
STRATEGIES = ("sequence", "cycle", "cycle_rev")
TINY = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 5}.items()
}


def shared(build, strategy="cycle_rev", unique=3, **flags):
    flags = {**TINY, "encoder_unique_layers": unique, "decoder_unique_layers": unique, **flags}
    return build("shared_transformer", layer_sharing=strategy, **flags)


def logits(model, batch):
    return model(**batch)[0]


OPTIONS = [
    {},
    {"encoder_normalize_before": True, "decoder_normalize_before": True},
    {"share_all_embeddings": True},
    {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
    {"no_cross_attention": True, "cross_self_attention": True},
    {"activation_fn": "gelu", "checkpoint_activations": True},
    {"offload_activations": True},
    {"adaptive_softmax_cutoff": "20,30"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_equals_fairseq_when_nothing_is_shared(build, batch, options):
    """With M = N, and from the same seed: same names, outputs and gradients as fairseq's own Transformer."""
    ours = shared(build, "cycle", 5, **options)
    stock = build("transformer", **TINY, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(logits(ours, batch), logits(stock, batch), rtol=0, atol=1e-6)
    logits(ours, batch).sin().sum().backward()
    logits(stock, batch).sin().sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def unrolled(build, model, strategy, unique, **options):
    """fairseq's Transformer with the layers of ``model`` copied to every depth."""
    stock = build("transformer", **TINY, **options)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    for side in ("encoder", "decoder"):
        for depth, index in enumerate(layer_schedule(strategy, unique, 5)):
            for name, tensor in getattr(model, side).layers._modules[str(index)].state_dict().items():
                state[f"{side}.layers.{depth}.{name}"] = tensor
    stock.load_state_dict(state)
    return stock


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("unique", (1, 2, 3))
def test_equals_unrolled_fairseq(build, batch, strategy, unique):
    """Outputs are those of the unrolled model; a gradient is the sum of the gradients over the depths it serves."""
    ours = shared(build, strategy, unique)
    stock = unrolled(build, ours, strategy, unique)
    torch.testing.assert_close(logits(ours, batch), logits(stock, batch), rtol=0, atol=1e-6)
    logits(ours, batch).sin().sum().backward()
    logits(stock, batch).sin().sum().backward()
    for side in ("encoder", "decoder"):
        schedule = layer_schedule(strategy, unique, 5)
        layers = getattr(stock, side).layers
        for index in range(unique):
            for name, parameter in getattr(ours, side).layers._modules[str(index)].named_parameters():
                total = sum(
                    dict(layers[depth].named_parameters())[name].grad for depth in range(5) if schedule[depth] == index
                )
                torch.testing.assert_close(parameter.grad, total, rtol=1e-5, atol=1e-5, msg=name)


def decode(model, batch, reorder=None):
    """Logits of each step of incremental decoding; ``reorder = (step, order)`` permutes the rows of all caches then."""
    encoder_out = model.encoder(batch["src_tokens"], batch["src_lengths"])
    previous, state, steps = batch["prev_output_tokens"], {}, []
    for step in range(previous.size(1)):
        out, _ = model.decoder(previous[:, : step + 1], encoder_out=encoder_out, incremental_state=state)
        steps.append(out[:, -1])
        if reorder and step == reorder[0]:
            order = torch.tensor(reorder[1])
            model.decoder.reorder_incremental_state_scripting(state, order)
            encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
            previous = previous[order]
    return steps


def full_rows(batch):
    """The batch with targets of one length: what a beam holds has no padding."""
    previous = batch["prev_output_tokens"].clone()
    previous[previous == 1] = 7
    return {**batch, "prev_output_tokens": previous}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"no_cross_attention": True, "cross_self_attention": True}], ids=str)
def test_incremental_equals_full(build, batch, strategy, options):
    model = shared(build, strategy, 2, **options)
    batch = full_rows(batch)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(decode(model, batch), 1), logits(model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("order", ([1, 0, 2, 2, 5, 4], [3, 3, 4, 5]), ids=("within-sentences", "sentence-finished"))
@pytest.mark.parametrize("beam", (1, 2))
def test_incremental_equals_full_after_reordering(build, batch, strategy, order, beam):
    """Beam search drops, swaps and repeats hypotheses: from then on every depth sees the caches of the new rows."""
    model = shared(build, strategy, 2)
    batch = {name: value.repeat_interleave(2, 0) for name, value in full_rows(batch).items()}
    batch["prev_output_tokens"][1::2, 1:] += 1
    model.decoder.set_beam_size(beam)  # 2: fairseq keeps the keys and values of the source once per sentence
    with torch.no_grad():
        steps = decode(model, batch, reorder=(3, order))
        expected = logits(model, {name: value[order] for name, value in batch.items()})
    torch.testing.assert_close(torch.stack(steps[4:], 1), expected[:, 4:], rtol=0, atol=1e-6)


def test_naive_repetition_breaks_decoding(build, batch):
    """The trap this design avoids: one fairseq decoder layer repeated shares one cache between its depths."""
    model = shared(build, "cycle", 1)
    naive = unrolled(build, model, "cycle", 1)
    naive.decoder.layers = torch.nn.ModuleList([naive.decoder.layers[0]] * 5)
    batch = full_rows(batch)
    with torch.no_grad():
        torch.testing.assert_close(logits(naive, batch), logits(model, batch), rtol=0, atol=1e-6)
        assert (decode(naive, batch)[-1] - logits(naive, batch)[:, -1]).abs().max() > 0.1
        assert (decode(model, batch)[-1] - logits(model, batch)[:, -1]).abs().max() < 1e-6


def test_cross_attention_keys_are_computed_once_per_layer(build, batch, monkeypatch):
    model = shared(build, "cycle_rev", 2)
    calls = []
    for index in range(2):
        projection = model.decoder.layers._modules[str(index)].encoder_attn.k_proj
        projection.register_forward_hook(lambda *_, index=index: calls.append(index))
    with torch.no_grad():
        decode(model, full_rows(batch))
    assert calls == [0, 1]


def test_causal_and_independent_of_padding_and_other_rows(build, batch):
    model = shared(build, "cycle_rev", 2)
    changed = copy.deepcopy(batch)
    changed["prev_output_tokens"][0, 4] = 9
    with torch.no_grad():
        before, after = logits(model, batch), logits(model, changed)
        assert torch.equal(before[0, :4], after[0, :4]) and not torch.equal(before[0, 4], after[0, 4])
        alone = {"src_tokens": batch["src_tokens"][2:, -4:], "src_lengths": torch.tensor([4])}
        alone["prev_output_tokens"] = batch["prev_output_tokens"][2:, :3]
        torch.testing.assert_close(logits(model, alone)[0], before[2, :3], rtol=0, atol=1e-6)


def test_parameters_do_not_grow_with_depth(build):
    sizes = {
        depths: sum(
            p.numel() for p in shared(build, "cycle", 2, encoder_layers=depths, decoder_layers=depths).parameters()
        )
        for depths in (2, 4, 7)
    }
    assert len(set(sizes.values())) == 1
    plain = build("transformer", **{**TINY, "encoder_layers": 2, "decoder_layers": 2})
    assert sizes[4] == sum(each.numel() for each in plain.parameters())


def test_published_sizes(build):
    """The parameter counts of Takase and Kiyono (2021), Table 1, with a vocabulary of 32k: 61M and 63M."""
    vocabulary = 32768

    def millions(arch):
        model = build(arch, share_all_embeddings=True, dtype=torch.float32)
        count = sum(p.numel() for p in model.parameters())
        embedding = model.encoder.embed_tokens.weight
        return round((count + (vocabulary - embedding.size(0)) * embedding.size(1)) / 1e6)

    assert millions("shared_transformer_wmt_en_de") == millions("shared_transformer_wmt_en_de_18") == 61
    assert millions("universal_transformer_wmt_en_de") == 63


def test_layerdrop_skips_depths_in_training_only(build, batch):
    model = shared(build, "cycle", 2, encoder_layerdrop=0.5, decoder_layerdrop=0.5, dropout=0.0)
    reference = shared(build, "cycle", 2, dropout=0.0)
    assert torch.equal(logits(model, batch), logits(reference, batch))
    model.train()
    torch.manual_seed(0)
    assert len({len(model.encoder.layers.depths()) for _ in range(50)}) > 3
    assert not torch.equal(logits(model, batch), logits(reference, batch))


def test_loads_fairseq_checkpoints(build, batch):
    """A plain checkpoint of M layers loads as it is; one of N layers is folded when the shared layers are equal."""
    plain = build("transformer", **{**TINY, "encoder_layers": 3, "decoder_layers": 3})
    model = shared(build, "cycle_rev", 3, seed=2)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model.decoder.layers[4].fc1.weight, plain.decoder.layers[1].fc1.weight)

    again = shared(build, "cycle_rev", 3, seed=3)
    again.load_state_dict(unrolled(build, model, "cycle_rev", 3).state_dict(), strict=True)
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("flags", [{}, {"checkpoint_activations": True}, {"offload_activations": True}], ids=str)
def test_data_parallel_takes_a_layer_at_several_depths(build, batch, flags, tmp_path):
    """As under --ddp-backend pytorch_ddp: each gradient is ready once, and is that of the model alone."""
    model = shared(build, "cycle_rev", 2, **flags)
    logits(model, batch).sin().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with one_worker(tmp_path):
        parallel = torch.nn.parallel.DistributedDataParallel(model.train(), broadcast_buffers=False)
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        for _ in range(2):
            parallel.zero_grad()
            logits(parallel, batch).sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_refuses_checkpoints_that_do_not_fit(build):
    model = shared(build, "cycle_rev", 3)
    with pytest.raises(UsageError, match="layers 2 and 3, which it shares, differ"):
        model.load_state_dict(build("transformer", **TINY).state_dict())
    with pytest.raises(UsageError, match="has 4 layers in the checkpoint, this model has 3 unique layers at 5 depths"):
        model.load_state_dict(build("transformer", **{**TINY, "encoder_layers": 4}).state_dict())
    wider = build("transformer", **{**TINY, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_embed_dim": 64})
    with pytest.raises(UsageError, match="another architecture.*size mismatch"):
        model.load_state_dict(wider.state_dict())


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"strategy": "spiral"}, "unknown layer sharing strategy 'spiral': choose one of sequence, cycle"),
        ({"encoder_unique_layers": 6}, "6 unique layers cannot serve 5 depths.*between 1 and 5"),
        ({"decoder_unique_layers": 0}, "--decoder-unique-layers is 0"),
        ({"strategy": "sequence", "encoder_unique_layers": 4}, "never runs layer 3 of 4: use 3 unique layers"),
        ({"encoder_layers_to_keep": "0,1"}, "--encoder-layers-to-keep"),
        ({"init": "admin", "decoder_normalize_before": True}, "post-LN.*--decoder-normalize-before"),
        ({"base_layers": 1}, "--base-layers"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses_impossible_flags(build, flags, message):
    with pytest.raises(UsageError, match=message):
        shared(build, **{"strategy": "cycle", **flags})


@pytest.mark.parametrize("init", ("default", "admin"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_follows_float32(build, batch, init, dtype):
    """What --fp16 and --bf16 make of the model: outputs and gradients near those of float32, Admin's profile too."""
    models = [
        shared(build, "cycle_rev", 2, dtype=each, init=init, dropout=0.0).train() for each in (torch.float32, dtype)
    ]
    outputs = [logits(model, batch).float() for model in models]
    for output in outputs:
        output.log_softmax(-1)[..., 5].mean().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.15)
    reference, half = (model.decoder.layers[0].fc1.weight.grad.float() for model in models)
    assert half.isfinite().all() and torch.cosine_similarity(half.flatten(), reference.flatten(), 0) > 0.98


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_autocast_on_a_gpu(build, batch):
    """What --amp makes of a step."""
    model = shared(build, "cycle_rev", 2, dtype=torch.float32).cuda().train()
    batch = {name: value.cuda() for name, value in batch.items()}
    with torch.autocast("cuda", torch.float16):
        output = logits(model, batch)
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
