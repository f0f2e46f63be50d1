import gzip
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.tasks.image_classification import ImageClassificationConfig, ImageClassificationTask

Image = pytest.importorskip("PIL.Image")


def make(folder, split=None, **settings):
    cfg = SimpleNamespace(**{**vars(ImageClassificationConfig()), "seed": 1, "data": str(folder), **settings})
    task = ImageClassificationTask(cfg)
    if split:
        task.load_dataset(split)
        return task.dataset(split)
    return task


def batch_of(dataset, *indices):
    return dataset.collater([dataset[index] for index in indices])


def arrays(count=20, size=8, channels=None, classes=4, seed=1):
    rng = np.random.default_rng(seed)
    shape = (count, size, size) + ((channels,) if channels else ())
    return rng.integers(0, 256, shape, dtype=np.uint8), np.arange(count) % classes


def write_idx(path, array, compress=False, cut=0):
    content = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def npz(tmp_path):
    for split, count in (("train", 20), ("valid", 6)):
        images, labels = arrays(count)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    return tmp_path


@pytest.fixture
def folders(tmp_path):
    """Two classes of colour: red and green, in sizes of their own."""
    for split, count in (("train", 5), ("valid", 2)):
        for name, colour in (("green", (0, 255, 0)), ("red", (255, 0, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20 + 3 * number, 30), colour).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def test_npz(npz):
    images, labels = arrays(6)
    task = make(npz)
    assert task.image_size == (8, 8) and task.channels == 1 and task.classes == list("0123")
    batch = batch_of(make(npz, "valid"), 2, 5)
    expected = torch.from_numpy(images[[2, 5]]).float().unsqueeze(1) / 127.5 - 1
    assert torch.equal(batch["net_input"]["image"], expected)
    assert batch["target"].tolist() == labels[[2, 5]].tolist() and batch["nsentences"] == 2


@pytest.mark.parametrize("compress", (False, True))
def test_idx(tmp_path, compress):
    end = ".gz" if compress else ""
    images, labels = arrays()
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{end}", images, compress)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{end}", labels.astype(np.uint8), compress)
    batch = batch_of(make(tmp_path, "test"), 3)
    assert torch.equal(batch["net_input"]["image"][0, 0], torch.from_numpy(images[3]).float() / 127.5 - 1)
    assert batch["target"].tolist() == [3]
    with pytest.raises(UsageError, match="no split valid.*--held-out"):
        make(tmp_path, "valid")
    train, valid = make(tmp_path, "train", held_out=5), make(tmp_path, "valid", held_out=5)
    assert (len(train), len(valid)) == (15, 5)
    assert sorted([*train.images.rows, *valid.images.rows]) == list(range(20))
    assert batch_of(valid, 0)["target"].item() == labels[valid.images.rows[0]]


def test_folders(folders):
    task = make(folders, image_size=16)
    assert task.classes == ["green", "red"] and task.channels == 3
    batch = batch_of(make(folders, "valid", image_size=16), 0, 1, 2, 3)
    assert batch["target"].tolist() == [0, 0, 1, 1]
    assert batch["net_input"]["image"].shape == (4, 3, 16, 16)
    assert batch["net_input"]["image"][0].amax((1, 2)).tolist() == [-1, 1, -1]
    with pytest.raises(UsageError, match="give their size, for example --image-size 224"):
        make(folders)


def test_middle_is_cut_out(tmp_path):
    """The middle 7/8 of the shorter side, all of a white square in the middle."""
    for split in "train", "valid":
        (tmp_path / split / "only").mkdir(parents=True)
        picture = np.zeros((64, 128, 3), dtype=np.uint8)
        picture[4:60, 36:92] = 255
        Image.fromarray(picture).save(tmp_path / split / "only" / "square.png")
    image = batch_of(make(tmp_path, "valid", image_size=28), 0)["net_input"]["image"]
    assert image.shape == (1, 3, 28, 28)
    assert (image[..., 1:-1, 1:-1] == 1).all() and (image > 0).all()  # the edge is blended with what is around it


def test_augmentation_is_a_function_of_seed_epoch_and_image(folders):
    flags = {
        "image_size": 16,
        "random_resized_crop": True,
        "horizontal_flip": True,
        "randaugment_layers": 2,
        "mixup": 0.5,
    }
    one, two = make(folders, "train", **flags), make(folders, "train", **flags)
    one.set_epoch(2), two.set_epoch(2)
    assert torch.equal(batch_of(one, 1, 4, 7)["net_input"]["image"], batch_of(two, 1, 4, 7)["net_input"]["image"])
    first = torch.stack([torch.stack([one[i]["image"].float() for i in range(10)])])
    one.set_epoch(3)
    assert not torch.equal(first, torch.stack([torch.stack([one[i]["image"].float() for i in range(10)])]))
    alone, together = one[4]["image"], [one[i]["image"] for i in (3, 4)][1]
    assert torch.equal(alone, together)


def test_every_distortion_keeps_the_shape():
    from fairseq_adaptive.data.image_augmentation import DISTORTIONS, Augmentation

    rng = np.random.default_rng(1)
    for mode, channels in (("L", 1), ("RGB", 3)):
        picture = Image.fromarray(rng.integers(0, 256, (20, 24, channels), dtype=np.uint8).squeeze(), mode)
        changed = [distort(picture, 0.5, rng) for distort in DISTORTIONS]
        assert all(image.size == picture.size and image.mode == mode for image in changed)
        assert sum(image.tobytes() != picture.tobytes() for image in changed) >= 11
        for seed in range(20):
            array = Augmentation(True, 2, True, 2, 30)(picture, (14, 10), np.random.default_rng(seed))
            assert array.shape == (14, 10, channels) and array.dtype == np.uint8


def test_crop_padding_moves_the_image(npz):
    dataset, plain = make(npz, "train", crop_padding=2), make(npz, "train")
    moves = set()
    for index in range(20):
        moved, image = dataset[index]["image"][..., 0].numpy(), np.pad(plain[index]["image"][..., 0].numpy(), 2)
        found = [(y, x) for y in range(5) for x in range(5) if (image[y : y + 8, x : x + 8] == moved).all()]
        assert len(found) == 1
        moves.update(found)
    assert len(moves) > 8


def test_mixup_mixes_images_and_targets_alike(npz):
    mixed, plain = batch_of(make(npz, "train", mixup=0.5), 0, 1), batch_of(make(npz, "train"), 0, 1)
    share = mixed["target"][0, 0]
    assert torch.allclose(mixed["target"], torch.tensor([[share, 1 - share, 0, 0], [1 - share, share, 0, 0]]))
    image = plain["net_input"]["image"]
    assert torch.allclose(mixed["net_input"]["image"], share * image + (1 - share) * image.flip(0), atol=1e-6)
    assert batch_of(make(npz, "valid", mixup=0.5), 0)["target"].shape == (1,)


def test_corrupt_image_is_named(folders):
    path = folders / "train" / "red" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    dataset = make(folders, "train", image_size=16)
    with pytest.raises(UsageError, match=r"train/red/0.png cannot be read as an image .*: remove or replace it"):
        dataset[5]


@pytest.mark.parametrize(
    "images, labels, message",
    (
        (np.zeros((4, 8), np.uint8), np.zeros(4, int), r"train.npz holds images of shape \(4, 8\) and type uint8: N x"),
        (np.zeros((4, 8, 8), np.float32), np.zeros(4, int), "type float32"),
        (np.zeros((4, 8, 8, 2), np.uint8), np.zeros(4, int), "1 or 3 channels"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(3, int), r"4 images and labels of shape \(3,\)"),
        (np.zeros((4, 8, 8), np.uint8), np.array([0, 1, -1, 2]), "label -1: number the classes from 0"),
    ),
)
def test_wrong_arrays_are_named(tmp_path, images, labels, message):
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    with pytest.raises(UsageError, match=message):
        make(tmp_path)


def test_wrong_files_are_named(tmp_path, npz):
    with pytest.raises(UsageError, match="nothing is no folder"):
        make(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no split train: train/CLASS"):
        empty = tmp_path / "empty"
        empty.mkdir()
        make(empty)
    with pytest.raises(UsageError, match="has a split valid: leave out --held-out"):
        make(npz, held_out=3)
    images, labels = arrays(size=9)
    np.savez(npz / "valid.npz", images=images, labels=labels)
    with pytest.raises(UsageError, match="valid has images of 9 x 9 x 1, train of 8 x 8 x 1"):
        make(npz, "valid")
    images, labels = arrays(classes=5)
    np.savez(npz / "valid.npz", images=images, labels=labels)
    with pytest.raises(UsageError, match="valid and train have other classes: 4"):
        make(npz, "valid")
    (npz / "train.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UsageError, match="train.npz cannot be read"):
        make(npz)
    (npz / "train.npz").unlink()
    write_idx(npz / "train-images-idx3-ubyte", images, cut=7)
    write_idx(npz / "train-labels-idx1-ubyte", labels.astype(np.uint8))
    with pytest.raises(UsageError, match="promises 20 x 8 x 8 bytes and holds 1273: fetch it again"):
        make(npz)
