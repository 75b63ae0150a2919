"""The head of masked-image pretraining: a small transformer that tells the hidden patches from the visible ones.

Shapes: B rows, N visible patches, T all patches, P numbers of a patch, D d_model, E width of the decoder.
Source: He et al. 2021 (MAE), arXiv 2111.06377, section 3.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import Block
from megascale.model.context import Context, MaskedImage
from megascale.model.linear import Linear
from megascale.model.norm import build_norm
from megascale.model.patch_embedding import sine_positions

NORM_EPS = 1e-6
"""Added to the variance of a patch, as in the published code."""


class MaeHead(nn.Module):
    """Visible patches in their places and one learned vector in all others, plus positions, through blocks of its own.

    Its linear layers outside of blocks are whole on every tp rank.

    Cost: the blocks see all patches: with the published shapes a tenth of ViT-L's work on all of them.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        own, vision = decoder_config(config), config.vision
        self.vision = vision
        self.embed = Linear(config.d_model, own.d_model, bias=True)
        self.mask_token = nn.Parameter(torch.empty(own.d_model))
        self.blocks = nn.ModuleList(Block(own, f"head.blocks.{index}", axes) for index in range(own.num_layers))
        self.norm = build_norm(own)
        self.predict = Linear(own.d_model, vision.patch_numbers, bias=True)

    def forward(
        self, hidden_BND: torch.Tensor, context: Context, last_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The numbers of every patch, by row, column and colour, normalised as in training; `last_B` changes nothing.

        Shape: (B, 1 + N, D) to (B, T, P).
        """
        image, num_cls = context.masked_image, int(self.vision.has_cls)
        embedded_BNE = self.embed(hidden_BND)
        width = embedded_BNE.shape[2]
        places_BNE = image.visible_BN[..., None].expand(-1, -1, width)
        hidden_BTE = self.mask_token.to(embedded_BNE.dtype).expand(len(hidden_BND), self.vision.num_patches, width)
        hidden_BTE = hidden_BTE.scatter(1, places_BNE, embedded_BNE[:, num_cls:])
        hidden_BTE = hidden_BTE + sine_positions(self.vision.num_patches, width, hidden_BTE.device).to(hidden_BTE.dtype)
        hidden_BTE = torch.cat((embedded_BNE[:, :num_cls], hidden_BTE), dim=1)
        for block in self.blocks:
            hidden_BTE = block(hidden_BTE, image.decoder)
        return self.predict(self.norm(hidden_BTE))[:, num_cls:]

    def loss(self, hidden_BND: torch.Tensor, context: Context, labels_BT: torch.Tensor) -> torch.Tensor:
        """Sum over the patches with a label of the mean squared error of their numbers, fp32."""
        predicted_BTP = self(hidden_BND, context).float()
        error_BT = (predicted_BTP - self.targets(context.masked_image)).square().mean(dim=-1)
        return torch.where(labels_BT >= 0, error_BT, 0).sum()

    def targets(self, image: MaskedImage) -> torch.Tensor:
        """What is to be predicted, fp32. Shape: (B, T, P)."""
        patches_BTP = image.patches_BTP
        if not self.vision.mae_patch_norm:
            return patches_BTP
        mean_BT1, variance_BT1 = patches_BTP.mean(dim=-1, keepdim=True), patches_BTP.var(dim=-1, keepdim=True)
        return (patches_BTP - mean_BT1) / (variance_BT1 + NORM_EPS).sqrt()


def decoder_config(config: ModelConfig) -> ModelConfig:
    """The shape of the decoder's blocks: those of the encoder with the decoder's depth, width and heads."""
    vision = config.vision
    return config.model_copy(update={
        "num_layers": vision.mae_decoder_layers, "d_model": vision.mae_decoder_width,
        "num_heads": vision.mae_decoder_heads, "num_kv_heads": None, "head_width": None, "d_ff": None,
    })
