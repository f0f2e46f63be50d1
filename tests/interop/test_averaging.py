"""Averaging: the mean of every weight, each counted once, of checkpoints that belong together."""

import copy

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import average_checkpoints, last_checkpoints, load_checkpoint, save_checkpoint


@pytest.fixture
def save(tmp_path):
    def save(state, name):
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def trio(flags_of, checkpoint, save):
    """Three checkpoints of a model whose embeddings are one tensor under three names."""
    paths, models = [], []
    for seed in (1, 2, 3):
        model, state = checkpoint("shared_transformer", seed=seed, **flags_of(share_all_embeddings=True))
        paths.append(save(state, f"checkpoint{seed}.pt"))
        models.append(model)
    return paths, models


EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")


def test_is_the_mean_of_every_weight(trio):
    paths, models = trio
    average = average_checkpoints(paths)["model"]
    assert list(average) == list(models[0].state_dict())
    for name, tensor in average.items():
        mean = torch.stack([model.state_dict()[name].double() for model in models]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-7, msg=name)


def test_shared_embeddings_stay_one_tensor(trio, tmp_path):
    paths, _ = trio
    average = average_checkpoints(paths)
    assert len({average["model"][name].data_ptr() for name in EMBEDDINGS}) == 1
    save_checkpoint(average, tmp_path / "average.pt")
    again = load_checkpoint(tmp_path / "average.pt")["model"]
    assert len({again[name].data_ptr() for name in EMBEDDINGS}) == 1


def test_tensors_that_share_memory_in_one_checkpoint_only_are_kept_apart(flags_of, checkpoint, save):
    """As when sharing was turned off between two checkpoints: one name must not get the mean of another."""
    _, tied = checkpoint("shared_transformer", **flags_of(share_all_embeddings=True))
    untied = copy.deepcopy(tied)
    untied["model"][EMBEDDINGS[2]] = untied["model"][EMBEDDINGS[2]] + 1
    average = average_checkpoints([save(tied, "a.pt"), save(untied, "b.pt")])["model"]
    assert average[EMBEDDINGS[0]].data_ptr() != average[EMBEDDINGS[2]].data_ptr()
    torch.testing.assert_close(average[EMBEDDINGS[2]], average[EMBEDDINGS[0]] + 0.5)


def test_copies_of_one_checkpoint_average_to_the_same_bits(trio, save):
    paths, models = trio
    state = torch.load(paths[0])
    average = average_checkpoints([save(state, f"copy{number}.pt") for number in range(3)])["model"]
    assert all(torch.equal(average[name], tensor) for name, tensor in models[0].state_dict().items())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_averaged_in_single_precision(flags_of, checkpoint, save, dtype):
    """7 times 1.0 and once the next larger number: in half precision the mean would be 1.0, or a sum would overflow."""
    _, state = checkpoint("shared_transformer", dtype=dtype, **flags_of())
    name = "encoder.layers.0.fc1.weight"
    paths = []
    for number in range(8):
        state["model"][name] = torch.full((32, 16), 1.0, dtype=dtype)
        state["model"][name][0, 0] = 60000.0
        if number == 0:
            state["model"][name][1, 1] += torch.finfo(dtype).eps
        paths.append(save(state, f"{number}.pt"))
    average = average_checkpoints(paths)["model"][name]
    assert average.dtype == torch.float32
    assert average[1, 1] == 1 + torch.finfo(dtype).eps / 8
    assert average[0, 0] == torch.tensor(60000.0, dtype=dtype)


def test_counters_and_flags_come_from_the_first(flags_of, checkpoint, save):
    _, state = checkpoint("shared_transformer", **flags_of())
    paths = []
    for count in (9, 4):
        state["model"]["count"], state["model"]["flag"] = torch.tensor(count), torch.tensor(count > 5)
        paths.append(save(state, f"{count}.pt"))
    average = average_checkpoints(paths)["model"]
    assert average["count"] == 9 and average["count"].dtype == torch.int64
    assert average["flag"].item() is True


def test_keeps_the_rest_of_the_first_but_no_optimizer(trio):
    average = average_checkpoints(trio[0])
    assert "last_optimizer_state" not in average
    assert average["extra_state"]["train_iterator"]["epoch"] == 3
    assert average["cfg"]["model"].layer_sharing == "cycle_rev"


def test_averages_plain_fairseq_checkpoints(flags_of, checkpoint, save):
    flags = {name: value for name, value in flags_of().items() if "unique" not in name and name != "layer_sharing"}
    states = [checkpoint("transformer", seed=seed, **flags)[1] for seed in (1, 2)]
    average = average_checkpoints([save(state, f"{number}.pt") for number, state in enumerate(states)])["model"]
    name = "decoder.layers.4.fc2.weight"
    torch.testing.assert_close(average[name], (states[0]["model"][name] + states[1]["model"][name]) / 2)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"unique": 3}, r"b\.pt cannot be averaged with .*a\.pt: only one of them has decoder\.layers\.2"),
        ({"encoder_ffn_embed_dim": 8}, r"b\.pt .*layers\.0\.fc1\.weight has the shapes \(8, 16\) and \(32, 16\)"),
        ({"strategy": "cycle"}, r"b\.pt .*trained with --layer-sharing cycle and cycle_rev"),
        ({"decoder_layers": 6}, r"b\.pt .*trained with --decoder-layers 6 and 5"),
        ({"encoder_attention_heads": 4}, r"b\.pt .*trained with --encoder-attention-heads 4 and 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses_checkpoints_of_different_models(flags_of, checkpoint, save, flags, message):
    first = save(checkpoint("shared_transformer", **flags_of())[1], "a.pt")
    second = save(checkpoint("shared_transformer", **flags_of(**flags))[1], "b.pt")
    with pytest.raises(UsageError, match=message):
        average_checkpoints([first, second])


def test_refuses_files_that_are_no_checkpoints(trio, save, tmp_path):
    paths, _ = trio
    with pytest.raises(UsageError, match="nowhere.pt is missing"):
        average_checkpoints([*paths, tmp_path / "nowhere.pt"])
    with pytest.raises(UsageError, match="tensor.pt is no fairseq checkpoint"):
        average_checkpoints([save(torch.ones(2), "tensor.pt")])
    with pytest.raises(UsageError, match="other.pt is no checkpoint of fairseq"):
        average_checkpoints([save({"weights": torch.ones(2)}, "other.pt")])
    with pytest.raises(UsageError, match="named twice"):
        average_checkpoints([paths[0], paths[1], paths[0]])
    with pytest.raises(UsageError, match="no checkpoint to average"):
        average_checkpoints([])


class Attack:
    def __reduce__(self):
        return open, ("/dev/null",)


def test_refuses_what_is_unsafe_to_load(flags_of, checkpoint, save):
    state = checkpoint("shared_transformer", **flags_of())[1]
    state["extra_state"]["surprise"] = Attack()
    with pytest.raises(UsageError, match="unsafe.pt is refused: it holds _?io.open"):
        average_checkpoints([save(state, "unsafe.pt")])


def test_never_overwrites(trio, tmp_path):
    paths, _ = trio
    state = load_checkpoint(paths[0])
    before = open(paths[1], "rb").read()
    with pytest.raises(UsageError, match="checkpoint2.pt exists"):
        save_checkpoint(state, paths[1])
    assert open(paths[1], "rb").read() == before
    with pytest.raises(UsageError, match="no folder"):
        save_checkpoint(state, tmp_path / "none" / "average.pt")


def test_last_checkpoints(tmp_path):
    for name in (
        "checkpoint2.pt",
        "checkpoint9.pt",
        "checkpoint10.pt",
        "checkpoint_2_900.pt",
        "checkpoint_10_1000.pt",
        "checkpoint_last.pt",
        "checkpoint_best.pt",
        "checkpoint11.pt.tmp",
    ):
        (tmp_path / name).touch()

    def names(*args, **kwargs):
        return [path[len(str(tmp_path)) + 1 :] for path in last_checkpoints(tmp_path, *args, **kwargs)]

    assert names(2) == ["checkpoint10.pt", "checkpoint9.pt"]
    assert names(2, upper_bound=9) == ["checkpoint9.pt", "checkpoint2.pt"]
    assert names(2, by="update") == ["checkpoint_10_1000.pt", "checkpoint_2_900.pt"]
    assert names(1, by="update", upper_bound=999) == ["checkpoint_2_900.pt"]
    with pytest.raises(UsageError, match="has 2 epoch checkpoints up to epoch 9, not 3"):
        names(3, upper_bound=9)
    with pytest.raises(UsageError, match="at least 1"):
        names(0)
    with pytest.raises(UsageError, match="no folder"):
        last_checkpoints(tmp_path / "checkpoint2.pt", 1)
