"""Documents as masked, ordered pairs: every token once, right labels, three treatments, determinism, the losses."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf

from fairseq_adaptive.criterions.masked_lm_sop import MaskedLMSOPLoss
from fairseq_adaptive.criterions.ponder_loss import PonderLoss, PonderLossConfig
from fairseq_adaptive.data.ngram_mask import NgramMask
from fairseq_adaptive.data.sop_dataset import SOPDataset
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording

BOS, PAD, EOS = 0, 1, 2
TINY = {
    "encoder_input_dim": 8,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_positions": 32,
}


@pytest.fixture(scope="module")
def words():
    """100 pieces, every second of which starts a word, and ``<mask>``."""
    dictionary = Dictionary()
    for number in range(100):
        dictionary.add_symbol(f"▁{number}" if number % 2 else f"{number}")
    dictionary.add_symbol("<mask>")
    return dictionary


def lines_of(documents):
    """As fairseq-preprocess stores documents of lines, with empty lines, some of them doubled, between."""
    lines = []
    for number, document in enumerate(documents):
        lines += [torch.tensor([*line, EOS]) for line in document]
        lines += [torch.tensor([EOS])] * (1 + number % 2)
    return lines


def make(documents, words, tokens_per_sample=16, seed=(1, 2), fresh=True, probability=0.15, **mask):
    lines = lines_of(documents)
    mask = NgramMask(words, probability, **mask)
    return SOPDataset(lines, [len(line) for line in lines], words, tokens_per_sample, mask, seed, fresh)


def restored(item):
    """The two parts before masking, in their order in the text."""
    tokens = torch.where(item["target"] != PAD, item["target"], item["source"]).tolist()
    middle = tokens.index(EOS)
    assert tokens[0] == BOS and tokens[-1] == EOS and tokens.count(EOS) == 2 and BOS not in tokens[1:]
    assert item["segments"].tolist() == [0] * (middle + 1) + [1] * (len(tokens) - middle - 1)
    parts = [tokens[1:middle], tokens[middle + 1 : -1]]
    assert all(parts)
    return parts[::-1] if item["swapped"] else parts


@pytest.fixture(scope="module")
def documents():
    """Documents of 2 to 90 tokens, all different within one, in lines of 1 to 9."""
    rng, documents = np.random.default_rng(3), []
    for size in [2, 13, 14, 26, 27, *rng.integers(2, 90, 40)]:
        tokens, lines = rng.permutation(np.arange(4, 104))[:size].tolist(), []
        while tokens:
            length = int(rng.integers(1, 10))
            lines.append(tokens[:length])
            tokens = tokens[length:]
        documents.append(lines)
    return documents


@pytest.mark.parametrize("tokens_per_sample", (6, 16, 200))
def test_every_token_once_in_order_and_documents_apart(documents, words, tokens_per_sample):
    dataset = make(documents, words, tokens_per_sample)
    pieces = [sum(restored(dataset[index]), []) for index in range(len(dataset))]
    assert all(2 <= len(piece) <= tokens_per_sample - 3 for piece in pieces)
    assert [len(piece) + 3 for piece in pieces] == dataset.sizes.tolist()
    for document in documents:
        rest = sum(document, [])
        while rest:
            piece = pieces.pop(0)
            assert piece == rest[: len(piece)]
            rest = rest[len(piece) :]
    assert not pieces


def test_parts_meet_at_the_end_of_a_line_where_there_is_one(documents, words):
    dataset = make(documents, words, 40)
    ends = [{line[-1] for line in document} for document in documents]
    owner = [number for number, document in enumerate(documents) for _ in range(-(-sum(map(len, document)) // 37))]
    inside = 0
    for index in range(len(dataset)):
        first, second = restored(dataset[index])
        possible = ends[owner[index]] & set((first + second)[:-1])
        assert first[-1] in possible or not possible
        inside += bool(possible)
    assert inside > 40
    long = make([[list(range(4, 44))]], words, 40)
    assert len({len(restored(long[0])[0]) for long.epoch in range(20)}) > 8


def test_half_are_swapped_and_parts_differ_between_epochs(documents, words):
    dataset, epochs = make(documents, words), []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        epochs.append([dataset[index]["swapped"] for index in range(len(dataset))])
    assert 0.45 < np.mean(epochs) < 0.55 and len(np.unique(epochs, axis=0)) == 8
    assert not dataset.can_reuse_epoch_itr_across_epochs


def test_is_a_function_of_seed_epoch_and_index(documents, words):
    def items(dataset, epoch, order):
        dataset.set_epoch(epoch)
        found = {index: dataset[index] for index in order}
        return [found[index]["source"].tolist() for index in range(len(dataset))]

    one, two, other = (make(documents, words, seed=seed) for seed in ((1, 2), (1, 2), (2, 2)))
    order = list(range(len(one)))
    third = items(one, 3, order)
    items(two, 1, order)
    assert third == items(two, 3, order[::-1])
    assert third != items(other, 3, order) and third != items(one, 4, order)
    fixed = make(documents, words, fresh=False)
    assert items(fixed, 1, order) == items(fixed, 2, order) and fixed.can_reuse_epoch_itr_across_epochs
    assert one.ordered_indices().tolist() == two.ordered_indices().tolist()
    assert sorted(one.ordered_indices()) == order


def test_mask_has_three_treatments(words):
    rng = np.random.default_rng(1)
    tokens = rng.integers(4, 104, 2000)
    tokens[[0, 900, 1999]] = BOS, EOS, EOS
    mask = NgramMask(words, 0.15)
    source, target = (np.stack(each) for each in zip(*(mask(tokens, np.random.default_rng(i)) for i in range(20))))
    drawn = target != PAD
    assert set(drawn.sum(1)) <= {299, 300} and (target[drawn] == np.broadcast_to(tokens, target.shape)[drawn]).all()
    assert not drawn[:, [0, 900, 1999]].any() and (source == tokens)[~drawn].all()
    masked, same = source[drawn] == mask.mask, (source == tokens)[drawn]
    assert abs(masked.mean() - 0.8) < 0.02 and abs(same.mean() - 0.1) < 0.02
    others = source[drawn][~masked & ~same]
    assert others.min() >= 4 and others.max() < mask.mask and len(set(others)) > 95


def spans(drawn):
    edges = np.flatnonzero(np.diff(np.concatenate(([0], drawn.astype(int), [0]))))
    return list(zip(edges[::2], edges[1::2]))


def test_mask_draws_spans_of_whole_words(words):
    tokens = np.tile([5, 4, 5, 6, 8], 4000)  # words of 2 and of 3 pieces
    lengths = []
    for seed in range(15):
        _, target = NgramMask(words, 0.01)(tokens, np.random.default_rng(seed))
        found = spans(target != PAD)
        cut = [(a, b) for a, b in found if a % 5 not in (0, 2) or b % 5 not in (0, 2)]
        assert len(cut) <= 1  # the last drawn
        lengths += [(tokens[a:b] == 5).sum() for a, b in found if (a, b) not in cut]
    counts = np.bincount(lengths, minlength=4)
    assert np.allclose(counts[1:4] / counts.sum(), np.array([6, 3, 2]) / 11, atol=0.05)
    _, target = NgramMask(words, 0.01, longest=1)(tokens, np.random.default_rng(1))
    assert np.mean([b - a <= 3 for a, b in spans(target != PAD)]) > 0.95  # a few are neighbours


def test_spans_end_at_special_symbols_and_all_can_be_masked(words):
    tokens = np.array([BOS, 5, EOS, 4, 6, EOS])
    source, target = NgramMask(words, 1.0, leave_unmasked=0, random=0)(tokens, np.random.default_rng(1))
    assert target.tolist() == [PAD, 5, PAD, 4, 6, PAD] and (source[[1, 3, 4]] == words.index("<mask>")).all()
    drawn = [NgramMask(words, 0.01)(tokens, np.random.default_rng(seed))[1] != PAD for seed in range(30)]
    assert {1} == {each.sum() for each in drawn}
    assert set(np.argmax(drawn, 1)) == {1, 3}


def test_spans_do_not_go_on_past_a_special_symbol(words):
    mask, tokens = NgramMask(words, 2 / 3, longest=2), np.array([BOS, 5, EOS, 7, 9, EOS])
    mask.share = np.array([0.0, 1.0])  # pairs of words only
    drawn = [np.flatnonzero(mask(tokens, np.random.default_rng(seed))[1] != PAD).tolist() for seed in range(600)]
    # a third: 1 then 4, or 4 then 1; were 1 and 3 a pair, only 4 then 1, a sixth
    assert 0.27 < np.mean([pair == [1, 4] for pair in drawn]) < 0.4


@pytest.mark.parametrize(
    "tokens_per_sample, documents, message",
    [
        (5, [[[4, 5]]], "--tokens-per-sample 5 leaves no room"),
        (16, [[[4]], [[5]]], "no document of two tokens"),
        (16, [], "no document of two tokens"),
    ],
)
def test_refuses_what_has_no_two_parts(words, tokens_per_sample, documents, message):
    with pytest.raises(UsageError, match=message):
        make(documents, words, tokens_per_sample)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"probability": 0.0}, "--mask-prob 0.0 is impossible"),
        ({"longest": 0}, "--mask-ngram 0 is impossible"),
        ({"leave_unmasked": 0.6, "random": 0.5}, "sum to at most 1"),
    ],
)
def test_refuses_impossible_masks(words, flags, message):
    with pytest.raises(UsageError, match=message):
        NgramMask(words, **flags)


@pytest.fixture
def sample(documents, dictionary):
    words = [[[token % 40 + 4 for token in line] for line in document] for document in documents[5:9]]
    dictionary = argparse.Namespace(
        **{name: getattr(dictionary, name) for name in ("bos", "eos", "pad", "nspecial")},
        symbols=dictionary.symbols,
        index=lambda symbol: 47,
    )
    dataset = make(words, dictionary)
    return dataset.collater([dataset[index] for index in range(5)])


def criterion_of(dictionary, **flags):
    task = argparse.Namespace(target_dictionary=dictionary, state=StatefulContainer())
    cfg = PonderLossConfig(task_criterion="masked_lm_sop", **flags)
    return PonderLoss.build_criterion(OmegaConf.create({"criterion": cfg}).criterion, task)


def test_losses_by_hand(build, dictionary, sample):
    model = build("albert_act_tiny", **TINY)
    loss, size, log = MaskedLMSOPLoss(None, argparse.Namespace(target_dictionary=dictionary))(model, sample)
    scores, extra = model(**sample["net_input"])
    masked = sample["target"] != PAD
    mlm = F.cross_entropy(scores[masked], sample["target"][masked])
    orders = model.sentence_order(extra)
    sop = F.cross_entropy(orders, sample["swapped"])
    assert size == int(masked.sum()) == log["sample_size"] and log["nsentences"] == 5
    torch.testing.assert_close(loss.double() / size, mlm + sop, rtol=1e-6, atol=1e-6)
    assert float(log["mlm_loss"]) / size == pytest.approx(float(mlm), rel=1e-5)
    assert float(log["sop_loss"]) / 5 == pytest.approx(float(sop), rel=1e-5)
    assert log["sop_correct"] == (orders.argmax(1) == sample["swapped"]).sum()
    assert log["mlm_correct"] == (scores[masked].argmax(1) == sample["target"][masked]).sum()
    assert 0 < sample["swapped"].sum() < 5


def test_expected_loss_of_pondernet(build, dictionary, sample):
    model = build("albert_act_tiny", halting="pondernet", **TINY).train()
    torch.nn.init.normal_(model.encoder.layers.halting.unit.weight, std=0.5)
    criterion = criterion_of(dictionary, kl_weight=0.0)
    with recording(model) as traces:
        model(**sample["net_input"])
    weights = traces["encoder.layers"][0].distribution.double()  # N x B x T
    stack, masked = model.encoder.layers, sample["target"] != PAD
    stack.every_depth = True
    scores, extra = model(**sample["net_input"])
    stack.every_depth = False
    words = scores.view(len(weights), *masked.shape, -1)
    orders = model.sentence_order(extra).view(len(weights), 5, 2)
    mlm = sop = 0.0
    for weight, word, order in zip(weights, words, orders):
        mlm += (weight[masked] * F.cross_entropy(word[masked], sample["target"][masked], reduction="none")).sum()
        sop += (weight[:, 0] * F.cross_entropy(order, sample["swapped"], reduction="none")).sum()
    loss, size, log = criterion(model, sample)
    assert float(log["mlm_loss"]) == pytest.approx(float(mlm), rel=1e-5)
    assert float(log["sop_loss"]) == pytest.approx(float(sop), rel=1e-5)
    assert float(loss) == pytest.approx(float(mlm + sop * size / 5), rel=1e-5)
    loss.backward()
    assert model.encoder.sentence_order_head.weight.grad.abs().sum() > 0


def test_needs_the_task_and_the_head(build, dictionary, sample):
    criterion = MaskedLMSOPLoss(None, argparse.Namespace(target_dictionary=dictionary))
    with pytest.raises(UsageError, match="use --task masked_lm_sop"):
        criterion(build("albert_act_tiny", **TINY), {name: sample[name] for name in sample if name != "swapped"})
    with pytest.raises(UsageError, match="needs a model with a sentence order head"):
        criterion(build("roberta"), sample)
