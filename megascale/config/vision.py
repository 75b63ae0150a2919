"""The section for models that read images: size, patches, what is predicted, and the decoder of MAE."""

from typing import Literal

from pydantic import Field

from megascale.config.base import Section


class VisionConfig(Section):
    """Images of family `vit`. A row is one image, its positions are patches."""

    image_size: int = Field(ge=1)
    """Height and width of the model's input, in pixels; a multiple of `patch_size`."""

    patch_size: int = Field(ge=1)
    """Height and width of a patch, in pixels; 16 in ViT-B/16 (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

    channels: int = Field(3, ge=1)
    """Colours of a pixel."""

    pooling: Literal["cls", "mean"] = "cls"
    """What the head reads: a class token, as in ViT, or the mean of all patches (Zhai et al. 2022, arXiv
    2106.04560)."""

    mae_decoder_layers: int = Field(8, ge=1)
    """Blocks of the decoder of masked-image pretraining (He et al. 2021, arXiv 2111.06377, section 3)."""

    mae_decoder_width: int = Field(512, ge=1)
    """Width of that decoder, in features."""

    mae_decoder_heads: int = Field(16, ge=1)
    """Attention heads of that decoder."""

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2
