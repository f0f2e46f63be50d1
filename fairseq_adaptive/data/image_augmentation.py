"""From an image on disk to one of the size that a model reads, for training with chance and otherwise without."""

import numpy as np

CROP_RATIO = 224 / 256  # of the shorter side, in evaluation


def _pil():
    from PIL import Image, ImageEnhance, ImageOps  # the extra "images"

    return Image, ImageEnhance, ImageOps


def _to_pil(image):
    if not isinstance(image, np.ndarray):
        return image
    return _pil()[0].fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_array(image):
    """A ``PIL.Image`` or an array, as an array H x W x channels."""
    image = np.asarray(image)
    return image if image.ndim == 3 else image[..., None]


def central_crop(image, size):
    """The middle 7/8 of the shorter side, at ``size``; what has that size already stays as it is.

    Args:
        image: ``PIL.Image`` or array H x W x channels
        size: (H, W)
    """
    if isinstance(image, np.ndarray) and image.shape[:2] == size:
        return image
    image, (height, width) = _to_pil(image), size
    scale = max(height / image.height, width / image.width) / CROP_RATIO
    # the part that fills the size after scaling, cut and scaled in one go
    box_height, box_width = height / scale, width / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), _pil()[0].Resampling.BILINEAR, box=box)


class Augmentation:
    """What training does to an image, out of chance given to it.

    Args:
        random_resized_crop: crop 8% to 100% of the area at a ratio of 3:4 to 4:3 (Szegedy et al., 2015), instead of
            the middle
        crop_padding: move the image by up to so many pixels
        horizontal_flip: mirror it half of the time
        randaugment_layers: distortions in a row of RandAugment (Cubuk et al., 2020)
        randaugment_magnitude: their strength, 0 to 30
    """

    def __init__(
        self,
        random_resized_crop=False,
        crop_padding=0,
        horizontal_flip=False,
        randaugment_layers=0,
        randaugment_magnitude=15,
    ):
        self.random_resized_crop, self.crop_padding = random_resized_crop, crop_padding
        self.horizontal_flip = horizontal_flip
        self.randaugment_layers, self.strength = randaugment_layers, randaugment_magnitude / 30

    def __call__(self, image, size, rng: np.random.Generator):
        """
        Args:
            image: ``PIL.Image`` or array H x W x channels
            size: (H, W)
            rng: where the chance comes from

        Returns:
            array H x W x channels
        """
        image = self._resized_crop(image, size, rng) if self.random_resized_crop else central_crop(image, size)
        if self.randaugment_layers:
            image = _to_pil(image)
            for _ in range(self.randaugment_layers):
                image = DISTORTIONS[rng.integers(len(DISTORTIONS))](image, self.strength, rng)
        image = to_array(image)
        if self.horizontal_flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if self.crop_padding:
            by = self.crop_padding
            padded = np.pad(image, ((by, by), (by, by), (0, 0)))
            top, left = rng.integers(0, 2 * by + 1, 2)
            image = padded[top : top + size[0], left : left + size[1]]
        return image

    def _resized_crop(self, image, size, rng):
        image = _to_pil(image)
        for _ in range(10):
            area = rng.uniform(0.08, 1) * image.width * image.height
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < width <= image.width and 0 < height <= image.height:
                left = int(rng.integers(image.width - width + 1))
                top = int(rng.integers(image.height - height + 1))
                box = (left, top, left + width, top + height)
                return image.resize((size[1], size[0]), _pil()[0].Resampling.BILINEAR, box=box)
        return central_crop(image, size)


def _sign(rng):
    return 1 if rng.random() < 0.5 else -1


def _affine(matrix):
    def distort(image, strength, rng):
        return image.transform(image.size, _pil()[0].Transform.AFFINE, matrix(image, strength * _sign(rng)))

    return distort


def _enhance(name):
    def distort(image, strength, rng):
        return getattr(_pil()[1], name)(image).enhance(1 + 0.9 * strength * _sign(rng))

    return distort


DISTORTIONS = (
    lambda image, strength, rng: image,
    lambda image, strength, rng: _pil()[2].autocontrast(image),
    lambda image, strength, rng: _pil()[2].equalize(image),
    lambda image, strength, rng: _pil()[2].posterize(image, 8 - round(4 * strength)),
    lambda image, strength, rng: _pil()[2].solarize(image, round(256 * (1 - strength))),
    lambda image, strength, rng: image.rotate(30 * strength * _sign(rng)),
    *map(_enhance, ("Color", "Contrast", "Brightness", "Sharpness")),
    _affine(lambda image, by: (1, 0.3 * by, 0, 0, 1, 0)),
    _affine(lambda image, by: (1, 0, 0, 0.3 * by, 1, 0)),
    _affine(lambda image, by: (1, 0, 0.45 * by * image.width, 0, 1, 0)),
    _affine(lambda image, by: (1, 0, 0, 0, 1, 0.45 * by * image.height)),
)
