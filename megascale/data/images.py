"""Images of a corpus: from the bytes of a sample to pixels, and to what a vision model is trained on. Without torch.

A sample is what a stock WebDataset reader calls one: a class and an encoded image, two members of the tar, one after
the other. Read together as a run of bytes it is LABEL_DIGITS digits, the rest of their 512-byte block, the header of
the second member, and from IMAGE_START on the encoded image.

Legend: B rows, T patches, H height, W width, C colours.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from megascale.config.objective import ObjectiveConfig
from megascale.config.vision import VisionConfig, num_visible_patches
from megascale.data.objectives import IGNORED_LABEL, IMAGE_ROW, Arrays, RowObjective
from megascale.data.permutation import derive_key
from megascale.data.row import Picture, Row
from megascale.errors import DataError

LABEL_DIGITS, IMAGE_START = 8, 1024
FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may read: its other formats are old, rare, and have had their faults."""
MAX_PIXELS = 1 << 26
"""Of an image, whatever its header says: 8192 x 8192, which take 200 MB."""
CROP_KEY, FLIP_KEY, MASK_KEY = 1, 2, 3
"""Keep apart what is drawn for one row."""
CROP_TRIES = 10
MAE_MASK_FRACTION = 0.75
"""He et al. 2021, section 4.1."""
LOWEST_ASPECT, HIGHEST_ASPECT = 3 / 4, 4 / 3
Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image, in pixels."""


def decode_sample(sample: np.ndarray, num_classes: int, place: str) -> Picture:
    """The image and class of a sample.

    Args:
        sample: its bytes, uint8.
        num_classes: the class must be below it.
        place: of the sample, for messages.

    Raises:
        DataError: no class, or no image that can be decoded.

    Cost: about 5 ms for a JPEG of 500 x 400 pixels.
    """
    content = sample.astype(np.uint8, copy=False).tobytes()
    digits = content[:LABEL_DIGITS]
    if not digits.isdigit() or int(digits) >= num_classes:
        raise DataError(f"{place}: its class is {digits!r}, not a number below {num_classes}, as many as there are")
    return Picture(decode_image(content[IMAGE_START:], place), int(digits))


def decode_image(content: bytes, place: str) -> np.ndarray:
    """The pixels of an encoded image, as red, green and blue, or as grey where it has no colours.

    Shape: (H, W, 3) or (H, W, 1) uint8.

    Raises:
        DataError: it isn't an image of `FORMATS`, is cut short or damaged, or is too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{place}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: isn't an image that can be decoded ({error}); remove it or mend it") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


@dataclass(frozen=True)
class ImageObjective:
    """The class of an image, or its hidden patches.

    Attributes:
        image_size, patch_size, channels: of the model's input, see `VisionConfig`.
        num_visible: patches that masked-image pretraining leaves visible; None for classification.
        crop_min_fraction: least share of the area that a random crop keeps; 1: no random crop, but the largest square
            in the middle.
        flips: whether half of the images are mirrored.
        mean, std: of a colour or of each, subtracted from pixels in 0 to 1, and divided by.
        row_tokens, overlap: an image is a row.
    """

    image_size: int
    patch_size: int
    channels: int
    num_visible: int | None
    crop_min_fraction: float
    flips: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    row_tokens: int = IMAGE_ROW.row_tokens
    overlap: int = IMAGE_ROW.overlap

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Images (B, C, H, W), and labels: of each image its class (B, 1), or 0 on each of its hidden patches (B, T).

        Tokens and documents are zeros, as an image has none.
        """
        size, is_masked = self.image_size, self.num_visible is not None
        images_BCHW = np.zeros((len(rows), self.channels, size, size), np.float32)
        labels_BT = np.full((len(rows), self.num_patches if is_masked else 1), IGNORED_LABEL, np.int64)
        for number, (row, key) in enumerate(zip(rows, keys_B.tolist(), strict=True)):
            if row is None:
                continue
            picture = row.picture or decode_sample(row.tokens, 10**LABEL_DIGITS, "an image")
            images_BCHW[number] = self.prepare(picture.pixels_HWC, key)
            labels_BT[number] = self.mask(key) if is_masked else picture.label
        nothing_BT = np.zeros(labels_BT.shape, np.int64)
        return Arrays(nothing_BT, labels_BT, nothing_BT.astype(np.int32), images_BCHW=images_BCHW)

    def prepare(self, pixels_HWC: np.ndarray, key: int) -> np.ndarray:
        """A part of the image, in the model's size, perhaps mirrored, normalised: (C, H, W) fp32."""
        image = as_image(pixels_HWC, self.channels)
        box = middle_square(image.size)
        if self.crop_min_fraction < 1:
            box = random_box(image.size, self.crop_min_fraction, key)
        size = (self.image_size, self.image_size)
        image = image.crop(box)  # first, or pixels outside of it would show at its edges
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        if self.flips and uniform(key, FLIP_KEY, 1)[0] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values_HWC = np.asarray(image, np.float32).reshape(*size, self.channels) / 255
        values_HWC = (values_HWC - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return values_HWC.transpose(2, 0, 1)

    def mask(self, key: int) -> np.ndarray:
        """Labels of a row's patches: 0 on hidden ones, so many for every row, and else none."""
        labels_T = np.full(self.num_patches, IGNORED_LABEL, np.int64)
        order = np.argsort(derive_key(key, MASK_KEY, np.arange(self.num_patches)), kind="stable")
        labels_T[order[self.num_visible :]] = 0
        return labels_T


def image_objective(vision: VisionConfig, settings: ObjectiveConfig) -> ImageObjective:
    """What a vision model learns from an image."""
    return ImageObjective(
        vision.image_size, vision.patch_size, vision.channels, visible_patches(vision, settings),
        settings.crop_min_fraction, settings.flips, settings.pixel_mean, settings.pixel_std,
    )


def visible_patches(vision: VisionConfig, settings: ObjectiveConfig) -> int | None:
    """Patches of an image that stay visible; None where none is hidden."""
    if not vision.is_mae:
        return None
    return num_visible_patches(vision.num_patches, settings.mask_fraction or MAE_MASK_FRACTION)


def plain(objective: RowObjective) -> RowObjective:
    """The objective as validation has it: images neither cropped at random nor mirrored. Masks stay."""
    if isinstance(objective, ImageObjective):
        return replace(objective, crop_min_fraction=1.0, flips=False)
    return objective


def as_image(pixels_HWC: np.ndarray, channels: int) -> Image.Image:
    """Pixels as Pillow has them, in the model's colours."""
    image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    return image.convert("L" if channels == 1 else "RGB")


def middle_square(size: tuple[int, int]) -> Box:
    """The largest square in the middle of an image of (width, height)."""
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def random_box(size: tuple[int, int], least: float, key: int) -> Box:
    """A part of an image of (width, height): of its area a share from `least` to 1, width to height from 3/4 to 4/3.

    Source: Szegedy et al. 2015, section 6. Where ten tries don't fit into the image it is the square in the middle.
    """
    width, height = size
    low, high = np.log(LOWEST_ASPECT), np.log(HIGHEST_ASPECT)
    for share, aspect, across, down in uniform(key, CROP_KEY, 4 * CROP_TRIES).reshape(-1, 4).tolist():
        area, ratio = width * height * (least + (1 - least) * share), np.exp(low + (high - low) * aspect)
        wide, tall = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(across * (width - wide + 1)), int(down * (height - tall + 1))
            return left, top, left + wide, top + tall
    return middle_square(size)


def uniform(key: int, purpose: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), a function of a row's key and of what they are for."""
    return (derive_key(key, purpose, np.arange(count)) >> np.uint64(11)) * 2.0**-53
