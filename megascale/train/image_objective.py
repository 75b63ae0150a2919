"""What a micro-batch of images is trained on: inputs, context and labels."""

import torch

from megascale.config.schema import RunConfig
from megascale.data.images import visible_patches
from megascale.engine.base import Objective
from megascale.model.axes import Axes
from megascale.model.context import MaskedImage, build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.patch_embedding import split_patches


def image_objective(config: RunConfig, axes: Axes) -> Objective:
    """A label for each image, or with MAE for each hidden patch. Dropout is keyed by (seed, step, row)."""
    model, vision = config.model, config.model.vision
    num_visible = visible_patches(vision, config.data.objective)

    def prepare(batch, step: int, loss_factor) -> tuple:
        images_BCHW, labels_BT = batch.images_BCHW, batch.labels_BT
        row_keys_B = derive_row_keys(batch.row_numbers_B, config.run.seed, step) if model.dropout else None

        def context_of(num_positions: int):
            return build_context(
                model, num_positions, images_BCHW.device, axes, row_keys_B=row_keys_B, loss_factor=loss_factor
            )

        if num_visible is None:
            return images_BCHW, context_of(vision.num_positions), labels_BT
        image = MaskedImage(
            visible_of(labels_BT, num_visible), target_patches(images_BCHW, vision.patch_size),
            context_of(vision.num_positions),
        )
        return images_BCHW, context_of(num_visible + vision.has_cls)._replace(masked_image=image), labels_BT

    return prepare


def visible_of(labels_BT: torch.Tensor, num_visible: int) -> torch.Tensor:
    """The patches without a label, rising; of a row without any label the first ones. Shape: (B, T) to (B, N) int64."""
    return (labels_BT >= 0).int().argsort(dim=1, stable=True)[:, :num_visible]


def target_patches(images_BCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The patches of images, their numbers by row, column and colour, as MAE's decoder gives them.

    Shape: (B, C, H, W) to (B, T, P).
    """
    channels = images_BCHW.shape[1]
    patches_BTP = split_patches(images_BCHW, patch_size)
    return patches_BTP.unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)
