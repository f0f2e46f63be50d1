"""Images on disk: a folder per class, NumPy archives, or the IDX files of MNIST."""

import gzip
import os
import zipfile
import zlib
from typing import List

import numpy as np

from fairseq_adaptive.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
HELD_OUT_ORDER = 0  # seed of the order from which --held-out takes the last


class Images:
    """Labelled images of one shape.

    ``images[i]`` is a ``PIL.Image`` or an array H x W x channels (uint8), before resizing.

    Args:
        labels: numbers of the classes
        classes: their names
        image_size: (H, W)
        channels: 1 or 3
    """

    def __init__(self, labels, classes: List[str], image_size, channels: int):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes, self.image_size, self.channels = classes, tuple(image_size), channels
        self.rows = np.arange(len(self.labels))

    def __len__(self):
        return len(self.rows)

    def label(self, index: int) -> int:
        return int(self.labels[self.rows[index]])

    def __getitem__(self, index):
        return self.read(self.rows[index])


class ArrayImages(Images):
    """Images held in memory, N x H x W or N x H x W x channels, uint8."""

    def __init__(self, name, images, labels, image_size):
        channels = images.shape[3] if images.ndim == 4 else 1
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or channels not in (1, 3):
            raise UsageError(
                f"{name} holds images of shape {images.shape} and type {images.dtype}: N x height x width "
                "[x 1 or 3 channels] of type uint8 is needed"
            )
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images) or not len(labels):
            raise UsageError(
                f"{name} holds {len(images)} images and labels of shape {labels.shape} and type {labels.dtype}: "
                "one whole number for each image is needed"
            )
        if labels.min() < 0:
            raise UsageError(f"{name} holds the label {labels.min()}: number the classes from 0")
        self.images = images if images.ndim == 4 else images[..., None]
        size = (image_size, image_size) if image_size else images.shape[1:3]
        super().__init__(labels, [str(number) for number in range(int(labels.max()) + 1)], size, channels)

    def read(self, row):
        return self.images[row]


class FolderImages(Images):
    """Images in a folder per class, opened with Pillow when they are needed."""

    def __init__(self, folder, image_size):
        if not image_size:
            raise UsageError(f"{folder} holds image files: give their size, for example --image-size 224")
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.paths, labels = [], []
        for number, name in enumerate(classes):
            files = sorted(file for file in os.listdir(os.path.join(folder, name)) if file.lower().endswith(EXTENSIONS))
            if not files:
                raise UsageError(f"{os.path.join(folder, name)} holds no image ({', '.join(EXTENSIONS)})")
            self.paths += [os.path.join(folder, name, file) for file in files]
            labels += [number] * len(files)
        if not classes:
            raise UsageError(f"{folder} holds no folder: make one for each class, with its images")
        super().__init__(labels, classes, (image_size, image_size), 3)

    def read(self, row):
        from PIL import Image  # the extra "images": arrays do without

        path = self.paths[row]
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits, which Pillow would not scale but clip to white
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
                return image.convert("RGB")
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path} cannot be read as an image ({error}): remove or replace it") from error


def _read_idx(path):
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise UsageError(f"{path} is no IDX file of bytes (it starts with {head.hex() or 'nothing'})")
            shape = np.frombuffer(file.read(4 * head[3]), dtype=">i4")
            data = np.frombuffer(file.read(), dtype=np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error}): fetch it again") from error
    if len(shape) != head[3] or data.size != np.prod(shape, dtype=np.int64):
        raise UsageError(f"{path} promises {' x '.join(map(str, shape))} bytes and holds {data.size}: fetch it again")
    return data.reshape(shape)


def _idx_paths(folder, split):
    for name in (split, {"test": "t10k"}.get(split, split)):
        for end in ("", ".gz"):
            paths = [os.path.join(folder, f"{name}-{kind}-ubyte{end}") for kind in ("images-idx3", "labels-idx1")]
            if os.path.exists(paths[0]):
                return paths
    return None


def _open(folder, split, image_size):
    if os.path.isdir(os.path.join(folder, split)):
        return FolderImages(os.path.join(folder, split), image_size)
    archive = os.path.join(folder, f"{split}.npz")
    if os.path.exists(archive):
        try:
            with np.load(archive) as arrays:  # never unpickles
                missing = {"images", "labels"} - set(arrays.files)
                if missing:
                    raise UsageError(f"{archive} holds {', '.join(arrays.files)}: images and labels are needed")
                return ArrayImages(archive, arrays["images"], arrays["labels"], image_size)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{archive} cannot be read ({error})") from error
    paths = _idx_paths(folder, split)
    if paths:
        return ArrayImages(paths[0], _read_idx(paths[0]), _read_idx(paths[1]), image_size)
    return None


def open_images(folder: str, split: str, image_size: int = 0, held_out: int = 0) -> Images:
    """Return the images of a split.

    Args:
        folder: with ``SPLIT/CLASS/*.jpg``, ``SPLIT.npz`` or ``SPLIT-images-idx3-ubyte[.gz]``
        split: train, valid or test (IDX files: also t10k)
        image_size: height and width, 0 for those of the arrays
        held_out: where there is no split valid, how many images of train are taken for it

    Raises:
        UsageError: when there is no such split, or it cannot be read, or has a wrong shape
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is no folder")
    images = None if held_out and split == "valid" else _open(folder, split, image_size)
    if split in ("train", "valid") and held_out:
        if _open(folder, "valid", image_size) is not None:
            raise UsageError(f"{folder} has a split valid: leave out --held-out")
        images = images or _open(folder, "train", image_size)
        if images is not None:
            if not 0 < held_out < len(images):
                raise UsageError(f"--held-out is {held_out} of {len(images)} images: use 1 to {len(images) - 1}")
            order = np.random.default_rng(HELD_OUT_ORDER).permutation(len(images))
            images.rows = np.sort(order[-held_out:] if split == "valid" else order[:-held_out])
    if images is None:
        advice = "; --held-out N takes N images of train for it" if split == "valid" else ""
        raise UsageError(
            f"{folder} has no split {split}: {split}/CLASS/*.jpg, {split}.npz or {split}-images-idx3-ubyte[.gz] is "
            f"needed{advice}"
        )
    return images
