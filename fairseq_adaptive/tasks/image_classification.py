"""Images and their classes: ``--task image_classification``."""

from dataclasses import dataclass, field

from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING

from fairseq_adaptive.data.image_augmentation import Augmentation
from fairseq_adaptive.data.image_dataset import ImageDataset
from fairseq_adaptive.data.image_files import open_images
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import OPTIONAL_WIDTH, PRICE, Range, check_ranges, ranged


@dataclass
class ImageClassificationConfig(FairseqDataclass):
    data: str = field(
        default=MISSING,
        metadata={
            "help": "folder with train/CLASS/*.jpg (valid/..., test/...), or train.npz ... (arrays images "
            "and labels), or train-images-idx3-ubyte[.gz] and train-labels-idx1-ubyte[.gz] ... as MNIST has"
        },
    )
    image_size: int = ranged(
        0, OPTIONAL_WIDTH, "height and width of the images; 0: as they are, which must be the same for all"
    )
    held_out: int = ranged(
        0,
        Range(int, 0, 10**9),
        "where there is no split valid: so many images of train, the last of a fixed random "
        "order, are valid and not trained on",
    )
    crop_padding: int = ranged(0, OPTIONAL_WIDTH, "train on images moved by up to so many pixels")
    random_resized_crop: bool = field(
        default=False, metadata={"help": "train on crops of 8% to 100% of the area (Szegedy et al., 2015)"}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "train on mirrored images, too"})
    randaugment_layers: int = ranged(
        0, Range(int, 0, 100), "distortions in a row of RandAugment (Cubuk et al., 2020); 0: none"
    )
    randaugment_magnitude: int = ranged(15, Range(int, 0, 30), "strength of RandAugment")
    mixup: float = ranged(
        0.0, PRICE, "train on mixtures of two images with a share from Beta(this, this) (Zhang et al., 2018)"
    )
    seed: int = II("common.seed")


@register_task("image_classification", dataclass=ImageClassificationConfig)
class ImageClassificationTask(FairseqTask):
    """Batches have ``net_input.image`` (B x channels x H x W, -1 to 1) and ``target`` (B, or B x classes with mixup).

    Args:
        cfg: :class:`ImageClassificationConfig`

    Raises:
        UsageError: for data that is missing or of a wrong shape, and options that contradict it
    """

    def __init__(self, cfg, **unused):
        super().__init__(cfg)
        check_ranges(cfg, type(self))
        self.train = open_images(cfg.data, "train", cfg.image_size, cfg.held_out)
        self.classes, self.image_size, self.channels = self.train.classes, self.train.image_size, self.train.channels

    def load_dataset(self, split, combine=False, **kwargs):
        cfg = self.cfg
        if split == "train":
            augment = Augmentation(
                cfg.random_resized_crop,
                cfg.crop_padding,
                cfg.horizontal_flip,
                cfg.randaugment_layers,
                cfg.randaugment_magnitude,
            )
            self.datasets[split] = ImageDataset(self.train, augment, cfg.mixup, cfg.seed)
            return
        images = open_images(cfg.data, split, cfg.image_size, cfg.held_out)
        if _shape(images) != _shape(self):
            raise UsageError(f"{split} has images of {_shape(images)}, train of {_shape(self)}: they must be the same")
        unknown = sorted(set(images.classes) - set(self.classes))
        if unknown or images.classes != self.classes[: len(images.classes)]:
            raise UsageError(f"{split} and train have other classes: {', '.join(unknown or self.classes)[:200]}")
        self.datasets[split] = ImageDataset(images)

    def max_positions(self):
        return None

    @property
    def source_dictionary(self):
        return None

    @property
    def target_dictionary(self):
        return None


def _shape(images):
    return " x ".join(map(str, (*images.image_size, images.channels)))
