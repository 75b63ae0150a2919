"""What family vit asks of the rest of a config, and of a layout."""

from collections.abc import Iterable

from megascale.config.model import ModelConfig, divisors
from megascale.config.schema import RunConfig


def extra_positions(model: ModelConfig) -> int:
    """Positions of the residual stream beside those of a row: a class token."""
    return int(model.vision is not None and model.vision.has_cls)


def vit_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """Rows are images, positions their patches."""
    model, train = config.model, config.train
    if model.vision is None:
        return
    num_patches, size, patch = model.vision.num_patches, model.vision.image_size, model.vision.patch_size
    for key, value in (("train.seq_len", train.seq_len), ("model.max_seq_len", model.max_seq_len)):
        if value != num_patches:
            yield (
                f"{key} = {value}, and a row of a vit is the patches of one image: ({size} / {patch})^2 ="
                f" {num_patches}; use {num_patches}"
            )
    if model.is_tied:
        yield "model.tie_embeddings = true: a vit has no token embedding that its head could share; leave it out"
    if model.vision.is_mae and model.d_model % 4:
        yield (
            f"model.d_model = {model.d_model} with MAE: sines and cosines of a patch's row and column take a quarter of"
            " the features each; use a multiple of 4"
        )
    yield from _data_rules(config)


def _data_rules(config: RunConfig) -> Iterable[str]:
    data, vision = config.data, config.model.vision
    objective, due = data.objective, "mae" if vision.is_mae else "classify"
    if data.packing != "none":
        yield f"data.packing = {data.packing}: an image is a row of its own; use packing: none"
    if data.document_mask:
        yield "data.document_mask = true: a row of a vit is one image; leave it out"
    if config.objective_kind != due:
        yield (
            f"data.objective.kind = {config.objective_kind} with model.vision.mae_decoder_layers ="
            f" {vision.mae_decoder_layers}: a model with such a decoder learns from masked images, one without learns"
            f" classes; use kind: {due}, or mae_decoder_layers {'of 1 or more' if due == 'classify' else '0'}"
        )
    if objective.mask_fraction is not None and not vision.is_mae:
        yield f"data.objective.mask_fraction = {objective.mask_fraction}: classes need all patches; leave it out"
    if objective.label_smoothing:
        yield f"data.objective.label_smoothing = {objective.label_smoothing}: a vit's loss has none; leave it out"
    for key in ("pixel_mean", "pixel_std"):
        values = getattr(objective, key)
        if len(values) not in (1, vision.channels):
            yield (
                f"data.objective.{key} has {len(values)} numbers, and model.vision.channels = {vision.channels}; give 1"
                f"{f' or {vision.channels}' if vision.channels > 1 else ''}"
            )


def vit_layout_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """Which layouts can hold a vit; those of its heads and widths are every family's."""
    parallel, vision = config.parallel, config.model.vision
    if vision is None:
        return
    if parallel.cp > 1:
        yield (
            f"parallel.cp = {parallel.cp} with model.family = vit: an image is a short row of {vision.num_positions}"
            " positions, which isn't shared out; use cp 1 and more tp or dp"
        )
    if vision.is_mae:
        yield from _mae_layout_rules(config)
    elif parallel.is_sequence_parallel and vision.num_positions % parallel.tp:
        whose = "" if parallel.sequence_parallel else " (on by default when tp > 1)"
        cls = " and a class token" if vision.has_cls else ""
        yield (
            f"{vision.num_patches} patches{cls} are {vision.num_positions} positions, which don't divide by parallel.tp"
            f" = {parallel.tp}, and sequence parallelism{whose} deals them out evenly; use sequence_parallel: false, or"
            f" a tp of {divisors(vision.num_positions)}{' or pooling: mean' if vision.has_cls else ''}"
        )


def _mae_layout_rules(config: RunConfig) -> Iterable[str]:
    parallel, vision = config.parallel, config.model.vision
    if parallel.pp > 1:
        yield (
            f"parallel.pp = {parallel.pp} with MAE: its decoder has another width and more positions than its encoder,"
            " and stages of a pipeline pass on one shape; use pp 1 and more tp or dp"
        )
    if parallel.is_sequence_parallel:
        yield (
            f"parallel.tp = {parallel.tp} with MAE: sequence parallelism (on by default when tp > 1) would cut the"
            " visible patches, which differ from image to image; use sequence_parallel: false"
        )
    if vision.mae_decoder_heads % parallel.tp:
        yield (
            f"parallel.tp = {parallel.tp} does not divide model.vision.mae_decoder_heads = {vision.mae_decoder_heads};"
            f" use one of {divisors(vision.mae_decoder_heads)}"
        )
