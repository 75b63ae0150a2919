"""`megascale data images`: from images with classes to a corpus."""

from pathlib import Path
from typing import Annotated

import typer


def images(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder with a folder of images for each class, WebDataset tars of .jpg, .png or .webp with .cls"
            " members, or the word digits for those of scikit-learn.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    validation_fraction: Annotated[float, typer.Option(help="Share of images for validation.", min=0, max=1)] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the order of images in shards.", min=0)] = 0,
    shard_bytes: Annotated[int, typer.Option(help="Bytes of a shard.", min=1)] = 1 << 27,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another corpus in the folder.")] = False,
) -> None:
    """Make a corpus of image shards, which family vit reads: a class and an encoded image each, as they are."""
    from rich.console import Console

    from data_tools.images import build_images

    console = Console(stderr=True)
    for manifest in build_images(source, out, validation_fraction, seed, shard_bytes, overwrite, console):
        typer.echo(
            f"{out / manifest.split}: {manifest.num_documents:,} images of {manifest.vocab_size} classes in"
            f" {manifest.num_shards} shards, {manifest.num_tokens / 1e6:.1f} MB"
        )
