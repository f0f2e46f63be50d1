"""Batches of images, and what chance does to them in training."""

import numpy as np
import torch
from fairseq.data import FairseqDataset
from torch.nn import functional as F

from fairseq_adaptive.data.image_augmentation import central_crop, to_array


class ImageDataset(FairseqDataset):
    """Images as -1 to 1, B x channels x H x W, with their classes.

    What happens to an image in an epoch is a function of seed, epoch and image, whatever the batch or the worker.

    Args:
        images: :class:`~fairseq_adaptive.data.image_files.Images`
        augment: :class:`~fairseq_adaptive.data.image_augmentation.Augmentation`, None for evaluation
        mixup: parameter of the Beta distribution of shares, 0 for none (Zhang et al., 2018)
        seed: of all chance
    """

    def __init__(self, images, augment=None, mixup=0.0, seed=0):
        self.images, self.augment, self.mixup, self.seed = images, augment, mixup, seed
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self):
        return True  # the order of batches does not depend on the epoch, and set_epoch is called all the same

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, size = self.images[index], self.images.image_size
        if self.augment is None:
            image = to_array(central_crop(image, size))
        else:
            image = self.augment(image, size, np.random.default_rng((self.seed, self.epoch, int(index))))
        return {"id": int(index), "image": torch.from_numpy(np.array(image)), "label": self.images.label(index)}

    def num_tokens(self, index):
        return 1

    def size(self, index):
        return 1

    def collater(self, samples):
        if not samples:
            return {}  # of a worker that has no batch left
        image = torch.stack([sample["image"] for sample in samples]).permute(0, 3, 1, 2).float() / 127.5 - 1
        target = torch.tensor([sample["label"] for sample in samples])
        if self.mixup:
            rng = np.random.default_rng((self.seed, self.epoch, samples[0]["id"], 1))
            share = float(rng.beta(self.mixup, self.mixup))
            classes = F.one_hot(target, len(self.images.classes)).float()
            image = share * image + (1 - share) * image.flip(0)
            target = share * classes + (1 - share) * classes.flip(0)
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {"image": image.contiguous()},
            "target": target,
            "ntokens": len(samples),
            "nsentences": len(samples),
        }
