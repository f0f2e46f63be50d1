from types import SimpleNamespace

import pytest
import torch
from fairseq.logging import metrics
from fairseq.models.roberta import RobertaModel, base_architecture

from fairseq_adaptive.criterions.tape_ponder_loss import TapePonderLoss, TapePonderLossConfig
from fairseq_adaptive.errors import UsageError

HEAD = "sentence_classification_head"
SMALL = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "encoder_layers": 2,
    "tape_mlp_dim": 8,
    "tape_ffn_embed_dim": 8,
    "tape_tokens": 6,
    "tape_bank_size": 40,
    "max_positions": 32,
}


def with_head(model):
    torch.manual_seed(9)
    model.register_classification_head(HEAD, num_classes=3)
    if model.encoder.sentence_encoder.tape:
        torch.nn.init.normal_(model.encoder.sentence_encoder.tape.reader.norm.weight, 1.5)
    return model.double().eval()


@pytest.fixture
def make(build):
    return lambda **flags: with_head(build("adatape", **{**SMALL, **flags}))


@pytest.fixture
def tokens(dictionary):
    torch.manual_seed(5)
    tokens = torch.randint(4, 44, (9, 7))
    tokens[:, 0] = dictionary.bos()
    for row in range(9):
        tokens[row, 3 + row % 5 :] = dictionary.pad()
    return tokens


@pytest.mark.parametrize(
    "flags",
    ({}, {"tape_query": "first", "tape_layer": 1}, {"encoder_unique_layers": 1}, {"encoder_normalize_before": True}),
)
def test_neither_padding_nor_other_rows_matter(make, tokens, dictionary, flags):
    model = make(**flags)
    dense, extra = model(tokens, classification_head_name=HEAD)
    assert flags or len(set(extra["tape"].live.sum(1).tolist())) > 1
    with torch.no_grad():
        packed, _ = model(tokens, classification_head_name=HEAD)
        assert torch.allclose(packed, dense, atol=1e-12)
        for row in range(9):
            alone = tokens[row : row + 1]
            alone = alone[:, : int(alone.ne(dictionary.pad()).sum())]
            assert torch.allclose(model(alone, classification_head_name=HEAD)[0][0], dense[row], atol=1e-12)


def test_features_are_those_of_the_tokens(make, tokens):
    features, extra = make()(tokens, features_only=True)
    assert features.shape == (9, 7, 16) and extra["bank_shared"] and extra["bank_size"] == 40
    assert make()(tokens)[0].shape == (9, 7, 48)  # and so a language-model head works


def test_is_roberta_without_tape(make, tokens, task):
    plain = make(tape_tokens=0)
    args = SimpleNamespace(**{**SMALL, "tokens_per_sample": 32})
    base_architecture(args)
    roberta = RobertaModel.build_model(args, task)
    roberta.register_classification_head(HEAD, num_classes=3)
    roberta = roberta.double().eval()
    roberta.load_state_dict(plain.state_dict())
    expected = roberta(tokens, classification_head_name=HEAD)[0]
    assert torch.allclose(plain(tokens, classification_head_name=HEAD)[0], expected, atol=1e-12)
    taped = make()
    before = taped.encoder.sentence_encoder.bank.weight.clone()
    taped.load_state_dict(roberta.state_dict())
    assert torch.equal(taped.encoder.sentence_encoder.bank.weight, before)
    ours, theirs = (model.encoder.sentence_encoder.layers[0].fc1.weight for model in (taped, roberta))
    assert torch.equal(ours, theirs)


def test_criterion_prices_the_tape_and_counts_what_was_read(make, tokens, task):
    model = make().train()
    cfg = TapePonderLossConfig(ponder_penalty=0.5, label_smoothing=0.1)
    criterion = TapePonderLoss(cfg, task)
    target = torch.arange(9).view(9, 1) % 3
    sample = {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": 40, "nsentences": 9}
    torch.manual_seed(1)
    loss, size, log = criterion(model, sample)
    torch.manual_seed(1)
    logits, extra = model(tokens, classification_head_name=HEAD)
    task_loss = torch.nn.functional.cross_entropy(logits.float(), target.view(-1), reduction="sum", label_smoothing=0.1)
    assert size == 9 and torch.allclose(loss, task_loss + 0.5 * extra["tape"].cost.sum())
    lengths = extra["tape"].live.sum(1)
    assert log["tape_tokens"] == lengths.sum()
    assert [log[f"tape_len_{n}"] for n in range(7)] == [(lengths == n).sum() for n in range(7)]
    read = {entry for entry in extra["tape"].entries.flatten().tolist() if entry >= 0}
    assert log["bank_used"] == len(read) and log["bank_entries"] == 40
    log = {key: torch.as_tensor(value) for key, value in log.items()}
    with metrics.aggregate("test") as meters:
        TapePonderLoss.reduce_metrics([log, log])
    values = meters.get_smoothed_values()
    assert values["bank_used"] == pytest.approx(len(read) / 40, abs=1e-3)
    assert values["tape_len"] == pytest.approx(lengths.double().mean().item(), abs=1e-3)
    shares = dict(part.split(":") for part in values["tape_lens"].split())
    assert sum(map(float, shares.values())) == pytest.approx(1, abs=2e-3)
    assert set(map(int, shares)) == set(lengths.tolist())


def test_targets_may_be_shares_or_numbers(make, tokens, task):
    model = make()
    sample = {"net_input": {"src_tokens": tokens}, "ntokens": 40, "nsentences": 9}
    criterion = TapePonderLoss(TapePonderLossConfig(), task)
    hard = criterion(model, {**sample, "target": torch.ones(9, dtype=torch.long)})
    soft = criterion(model, {**sample, "target": torch.eye(3)[torch.ones(9, dtype=torch.long)]})
    assert torch.allclose(hard[0], soft[0]) and hard[2]["ncorrect"] == soft[2]["ncorrect"]
    model.register_classification_head("number", num_classes=1)
    cfg = TapePonderLossConfig(regression_target=True, classification_head_name="number", ponder_penalty=0)
    target = torch.randn(9)
    loss = TapePonderLoss(cfg, task)(model.double(), {**sample, "target": target})[0]
    number = model(tokens, classification_head_name="number")[0].view(-1)
    assert torch.allclose(loss, (number.float() - target).square().sum().to(loss.dtype), atol=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    (
        ({"tape_bank_size": 17}, "bank of 17 entries can be exhausted"),
        ({"tape_layer": 2}, "--tape-layer is 2: use 0 to 1"),
        ({"tape_threshold": 8}, "threshold is 8: use more than 0, and at most the 6"),
    ),
)
def test_refuses(make, flags, message):
    with pytest.raises(UsageError, match=message):
        make(**flags)
