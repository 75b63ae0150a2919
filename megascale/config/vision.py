"""The section for models that read images: size, patches, what is predicted, and the decoder of MAE."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megascale.config.base import Section


class VisionConfig(Section):
    """Images of family `vit`. A row is one image, its positions are patches."""

    image_size: int = Field(ge=1)
    """Height and width of the model's input, in pixels; a multiple of `patch_size`."""

    patch_size: int = Field(ge=1)
    """Height and width of a patch, in pixels; 16 in ViT-B/16 (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

    channels: Literal[1, 3] = 3
    """Colours of a pixel: red, green and blue, or 1 for grey."""

    pooling: Literal["cls", "mean"] = "cls"
    """What the head reads: a class token, as in ViT, or the mean of all patches (Zhai et al. 2022, arXiv
    2106.04560)."""

    mae_decoder_layers: int = Field(0, ge=0)
    """Blocks of the decoder of masked-image pretraining, 8 in He et al. 2021 (arXiv 2111.06377, section 3). 0, the
    default: no such decoder, the head tells classes."""

    mae_decoder_width: int = Field(512, ge=4, multiple_of=4)
    """Width of that decoder, in features; its feed-forward layers are four times as wide."""

    mae_decoder_heads: int = Field(16, ge=1)
    """Attention heads of that decoder."""

    mae_patch_norm: bool = True
    """Whether the decoder predicts each patch less its mean and divided by its standard deviation, which learns better
    features (He et al. 2021, table 1d), or its pixels as they are."""

    @property
    def num_patches(self) -> int:
        """Patches of an image: the positions of a row, train.seq_len."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Positions of the residual stream: the patches and, where there is one, the class token before them."""
        return self.num_patches + self.has_cls

    @property
    def has_cls(self) -> bool:
        """Whether a class token stands before the patches."""
        return self.pooling == "cls"

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch_size**2

    @property
    def is_mae(self) -> bool:
        """Whether the model is trained on masked images."""
        return self.mae_decoder_layers > 0

    @model_validator(mode="after")
    def check_sizes(self) -> Self:
        """Refuses patches that don't tile the image, and heads that don't share the decoder's width."""
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            sizes = " or ".join(str(size) for size in (below, below + self.patch_size) if size)
            raise ValueError(
                f"model.vision.patch_size = {self.patch_size} does not divide model.vision.image_size ="
                f" {self.image_size}; use an image_size of {sizes}"
            )
        if self.is_mae and self.mae_decoder_width % self.mae_decoder_heads:
            raise ValueError(
                f"model.vision.mae_decoder_heads = {self.mae_decoder_heads} does not divide"
                f" model.vision.mae_decoder_width = {self.mae_decoder_width}"
            )
        return self


def num_visible_patches(num_patches: int, mask_fraction: float) -> int:
    """Patches of an image that stay visible in masked-image pretraining: at least one, and one at least is hidden."""
    return min(max(1, int(num_patches * (1 - mask_fraction))), num_patches - 1)
