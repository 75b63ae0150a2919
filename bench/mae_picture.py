"""Shows what masked-image pretraining has learned: validation images, what the model sees of them, what it makes of it.

Usage: python -m bench.mae_picture RUN OUT.png
It also prints the error on the hidden patches, and that of the mean training image in their place.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.run_file import peek_run_store
from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.data.loader import evaluation_batches
from megascale.data.stream import open_stream, open_validation
from megascale.model.axes import ONE_RANK
from megascale.train.generate import load_model
from megascale.train.image_objective import image_objective, target_patches

SHOWN, BATCH_ROWS = 10, 64
KINDS = ("original", "what is seen", "reconstruction")


def as_images(patches_BTP: torch.Tensor, config: RunConfig) -> torch.Tensor:
    """Patches in their places, as pixels in 0 to 1. Shape: (B, T, P) to (B, H, W, C)."""
    vision, objective = config.model.vision, config.data.objective
    side, patch = vision.image_size // vision.patch_size, vision.patch_size
    tiles = patches_BTP.view(len(patches_BTP), side, side, patch, patch, vision.channels)
    images_BHWC = tiles.permute(0, 1, 3, 2, 4, 5).reshape(len(tiles), vision.image_size, vision.image_size, -1)
    return (images_BHWC * torch.tensor(objective.pixel_std) + torch.tensor(objective.pixel_mean)).clamp(0, 1)


def patches_of(batches, config: RunConfig) -> torch.Tensor:
    """All images of some batches as patches, padding left out. Shape: (rows, T, P)."""
    return torch.cat([
        target_patches(batch.images_BCHW[batch.row_numbers_B >= 0], config.model.vision.patch_size) for batch in batches
    ])


def draw(panels: list[torch.Tensor], path: Path) -> None:
    """A row of images for each kind."""
    matplotlib.rcParams["svg.hashsalt"] = "megascale"
    figure = Figure(figsize=(1.0 * SHOWN, 3.4), layout="constrained")
    axes = figure.subplots(len(panels), SHOWN)
    for row, (kind, images_BHWC) in enumerate(zip(KINDS, panels, strict=True)):
        for column, image_HWC in enumerate(images_BHWC):
            axes[row, column].imshow(image_HWC.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(kind, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")


@torch.no_grad()
def main(run: Path, path: Path) -> None:
    checkpoint = peek_checkpoint(peek_run_store(run))
    config = parse_config(checkpoint.index.run.config, source=str(run))
    if not config.model.vision or not config.model.vision.is_mae or config.model.vision.mae_patch_norm:
        raise SystemExit(f"{run} isn't a run of MAE with model.vision.mae_patch_norm: false, whose pixels can be shown")
    model, prepare = load_model(checkpoint, config), image_objective(config, ONE_RANK)
    stream, (validation,) = open_stream(config, derive(config, 1)), open_validation(config)
    training = stream.corpora[0]
    mean_TP = patches_of(evaluation_batches(training, stream.objective, BATCH_ROWS, 0, 1), config).mean(dim=0)
    sums, panels = torch.zeros(2), None
    for batch in evaluation_batches(validation, stream.objective, BATCH_ROWS, 0, 1):
        inputs, context, labels_BT = prepare(batch, 0, None)
        predicted_BTP, wanted_BTP = model(inputs, context), context.masked_image.patches_BTP
        is_hidden_BT = labels_BT >= 0
        sums += torch.stack([
            (guess - wanted_BTP)[is_hidden_BT].square().mean(dim=-1).sum() for guess in (predicted_BTP, mean_TP)
        ])
        if panels is None:
            is_hidden_BT1 = is_hidden_BT[..., None]
            rebuilt_BTP = wanted_BTP.where(~is_hidden_BT1, predicted_BTP)
            kinds = (wanted_BTP, wanted_BTP.masked_fill(is_hidden_BT1, 0), rebuilt_BTP)
            panels = [as_images(kind[:SHOWN], config) for kind in kinds]
    draw(panels, path)
    num_hidden = validation.num_rows * (config.model.vision.num_patches - stream.objective.num_visible)
    model_error, mean_error = (sums / num_hidden).tolist()
    share = model_error / mean_error
    print(f"error on hidden patches {model_error:.4f}, of the mean image {mean_error:.4f} ({share:.1%})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
