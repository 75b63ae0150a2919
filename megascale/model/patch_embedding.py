"""The first layer of a vision transformer: an image's patches, a class token and positions, to the residual stream.

Shapes: B rows, C colours, H height, W width, T patches, N visible patches, P numbers of a patch, D d_model.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.dropout import Dropout
from megascale.model.embedding import Table
from megascale.model.linear import Linear
from megascale.parallel.axis import ALONE


class PatchEmbedding(nn.Module):
    """x = patch W + b, behind a class token where there is one, plus positions: learned, or with MAE fixed sines.

    The product is a convolution whose kernel is as large as its stride, and `patches.weight` that kernel with its dims
    after the first made one. It is whole on every tp rank; when sequence parallel, each keeps its positions.

    Shape: (B, C, H, W) fp32 to (B, 1 + T, D); with MAE to (B, 1 + N, D).
    Cost: 2 P D FLOPs a patch.
    Source: Dosovitskiy et al. 2020, section 3.1; He et al. 2021, section 3.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.vision = config.vision
        self.patches = Linear(self.vision.patch_numbers, config.d_model, bias=True)
        self.cls = nn.Parameter(torch.empty(config.d_model)) if self.vision.has_cls else None
        is_learned = not self.vision.is_mae
        self.positions = Table(self.vision.num_positions, config.d_model, ALONE) if is_learned else None
        self.dropout = Dropout(config.dropout, site="embedding")

    def forward(self, images_BCHW: torch.Tensor, context: Context) -> torch.Tensor:
        patches_BTP = split_patches(images_BCHW, self.vision.patch_size).to(self.patches.weight.dtype)
        hidden_BTD = self.patches(patches_BTP)
        if context.masked_image is not None:
            positions_TD = sine_positions(self.vision.num_patches, hidden_BTD.shape[2], hidden_BTD.device)
            hidden_BTD = pick(hidden_BTD + positions_TD.to(hidden_BTD.dtype), context.masked_image.visible_BN)
        if self.cls is not None:
            cls_B1D = self.cls.expand(len(hidden_BTD), 1, -1)
            hidden_BTD = torch.cat((cls_B1D.to(hidden_BTD.dtype), hidden_BTD), dim=1)
        if self.positions is not None:
            hidden_BTD = hidden_BTD[:, context.columns_T] + self.positions(context.position_ids_BT)
        return self.dropout(hidden_BTD, context)


def split_patches(images_BCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The patches of images, row after row, their numbers by colour, row and column, as a convolution's kernel has
    them. Shape: (B, C, H, W) to (B, T, P).
    """
    tiles_BCYXyx = images_BCHW.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return tiles_BCYXyx.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def pick(values_BTD: torch.Tensor, places_BN: torch.Tensor) -> torch.Tensor:
    """Some positions of each row. Shape: (B, T, D), (B, N) int64, to (B, N, D)."""
    return values_BTD.gather(1, places_BN[..., None].expand(-1, -1, values_BTD.shape[2]))


def sine_positions(num_patches: int, width: int, device: torch.device) -> torch.Tensor:
    """Positions in the image as sines and cosines of the column in the first half of the features, then of the row.

    Shape: (T, D) fp32, computed in fp64.
    Source: Vaswani et al. 2017, section 3.5, once for each axis, as in the published code of MAE.
    """
    side, quarter = round(num_patches**0.5), width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float64) / quarter)
    places = torch.arange(side, device=device, dtype=torch.float64)
    angles = places[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.cat((waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)), dim=1).float()
