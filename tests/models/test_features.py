"""``extract_features`` of every family is called, and answers, as that of fairseq's models."""

import pytest
import torch

ENCODER = {f"encoder_{name}": value for name, value in (("embed_dim", 16), ("ffn_embed_dim", 32), ("layers", 3))}
ENCODER = {**ENCODER, "encoder_attention_heads": 2, "max_positions": 32, "dropout": 0.0}
DECODER = {name.replace("encoder", "decoder"): value for name, value in ENCODER.items() if "encoder" in name}
TAPE = {"tape_bank_size": 50, "tape_tokens": 4}
ENCODERS = {
    "transkimmer": ("transkimmer_base", {"skim_bias": 0.0}),
    "transkimmer-act": ("transkimmer_base", {"halting": "act"}),
    "transkimmer-tape": ("transkimmer_base", {"reader": "tape", "reader_args": '{"bank_size": 50, "depth": 1}'}),
    "transkimmer-dense": ("transkimmer_base", {"no_skimming": True}),
    "albert_act": ("albert_act_tiny", {"encoder_input_dim": 8}),
    "albert_act-pondernet": ("albert_act_tiny", {"encoder_input_dim": 8, "halting": "pondernet"}),
    "albert_act-routed": ("albert_act_tiny", {"encoder_input_dim": 8, "router": "skimming"}),
    "adatape": ("adatape_tiny", TAPE),
    "adatape-act": ("adatape_tiny", {**TAPE, "halting": "act", "tape_layer": 1}),
    "adatape-skimming": ("adatape_tiny", {**TAPE, "skimming": True, "tape_layer": 2}),
    "adatape-dense": ("adatape_tiny", {"tape_tokens": 0}),
}


@pytest.fixture
def tokens(dictionary):
    torch.manual_seed(2)
    tokens = torch.randint(4, 44, (3, 9))
    tokens[0, -3:] = dictionary.pad()
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_states_of_all_depths(build, tokens, name):
    arch, flags = ENCODERS[name]
    model, real = build(arch, **{**ENCODER, **flags}), tokens != 1
    features, extra = model.encoder.extract_features(tokens)
    assert extra["inner_states"] is None and features.shape == (3, 9, 16)
    for found in (
        model.encoder.extract_features(tokens, return_all_hiddens=True),
        model(tokens, features_only=True, return_all_hiddens=True),
    ):
        states = found[1]["inner_states"]
        assert [each.shape for each in states] == [(9, 3, 16)] * 4
        torch.testing.assert_close(found[0][real], features[real], rtol=0, atol=1e-6)
        torch.testing.assert_close(states[-1].transpose(0, 1)[real], features[real], rtol=0, atol=1e-6)
        assert all((one - other).abs().max() > 1e-4 for one, other in zip(states[:2], states[1:2]))


@torch.no_grad()
@pytest.mark.parametrize("name", ("transkimmer-dense", "adatape-dense"))
def test_states_are_those_of_roberta(build, tokens, name):
    arch, flags = ENCODERS[name]
    theirs, ours = build("roberta", **ENCODER), build(arch, **{**ENCODER, **flags})
    state = theirs.state_dict()
    ours.upgrade_state_dict_named(state, "")
    ours.load_state_dict(state)
    real = tokens != 1
    for given in ({}, {"token_embeddings": torch.randn(3, 9, 16).double()}):
        states = [each.encoder.extract_features(tokens, True, **given)[1]["inner_states"] for each in (ours, theirs)]
        for our, their in zip(*states, strict=True):
            torch.testing.assert_close(our.transpose(0, 1)[real], their.transpose(0, 1)[real], rtol=0, atol=1e-6)


LANGUAGE_MODELS = {
    "shared": ("shared_transformer_lm_base", {"decoder_input_dim": 16, "decoder_output_dim": 16}),
    "shared-act": ("shared_transformer_lm_base", {"decoder_input_dim": 16, "decoder_output_dim": 16, "halting": "act"}),
    "transformer_xl": ("par_transformer_xl", {"layout": "af*2"}),
    "transformer_xl-adaptive": ("par_transformer_xl", {"layout": "af*2", "adaptive_softmax_cutoff": "20,30"}),
    "supernet": ("par_supernet", {"blocks": 2, "temperature_updates": 10}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_features_of_language_models(build, tokens, name):
    """By fairseq's keywords and positions; they are what the output layer takes."""
    arch, flags = LANGUAGE_MODELS[name]
    model = build(arch, **{**DECODER, **flags})
    torch.manual_seed(1)  # a supernet draws
    scores = model(tokens)[0]
    for call in (
        lambda: model.extract_features(tokens),
        lambda: model.decoder.extract_features(tokens, None),
        lambda: model.decoder.extract_features(tokens, None, None, False, 1, 1),
        lambda: model.decoder.extract_features(tokens, encoder_out=None, full_context_alignment=False),
    ):
        torch.manual_seed(1)
        features, extra = call()
        assert features.shape == (3, 9, 16) and "attn" in extra
        torch.testing.assert_close(model.output_layer(features), scores, rtol=0, atol=1e-6)


@torch.no_grad()
def test_incremental_features_of_a_transformer_xl(build, tokens):
    model = build("par_transformer_xl", **DECODER, layout="af*2")
    whole, state = model.extract_features(tokens[1:])[0], {}
    steps = [model.decoder.extract_features(tokens[1:, : step + 1], None, state)[0] for step in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("halting", ("none", "act"))
def test_features_of_translation_by_position(build, batch, halting):
    model = build("shared_transformer", **{**ENCODER, **DECODER}, halting=halting)
    source = model.encoder(batch["src_tokens"], batch["src_lengths"])
    previous = batch["prev_output_tokens"]
    given = model.decoder.extract_features(previous, source, None, True, 1, 1)
    named = {"full_context_alignment": True, "alignment_layer": 1, "alignment_heads": 1}
    named = model.decoder.extract_features(previous, encoder_out=source, incremental_state=None, **named)
    for one, other in ((given[0], named[0]), (given[1]["attn"][0], named[1]["attn"][0])):
        assert torch.equal(one, other)
