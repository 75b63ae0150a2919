"""From images with classes to the image shards of a corpus: a folder of class folders, WebDataset tars, or digits."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from webdataset.tariterators import base_plus_ext

from data_tools.image_shards import write_image_shards
from data_tools.output_folder import check_replaceable, clear_folder, partial_folder, replace_folder
from data_tools.progress import track_bytes
from data_tools.tar_walk import walk_tar
from data_tools.write_shards import write_file, write_index
from megascale.data.images import FORMATS, LABEL_DIGITS
from megascale.data.manifest import Manifest, load_manifest
from megascale.data.permutation import derive_key
from megascale.errors import DataError

CLASSES_FILE = "classes.json"
DIGITS = "digits"
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's name of a format -> extension of a member."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_KEY = 6
"""Separates the hash of images from those of documents and of the row order."""
DIGIT_LEVELS = 16
"""scikit-learn's digits have the values 0 to 16."""


class Source(NamedTuple):
    """An encoded image before it is read: `size` bytes from byte `offset` of a file; or the bytes themselves."""

    path: Path | None
    offset: int
    size: int
    label: int
    content: bytes = b""

    def read(self) -> bytes:
        """The encoded image."""
        if self.path is None:
            return self.content
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.path} at byte {self.offset}" if self.offset else str(self.path or DIGITS)


def build_images(
    source: str, out: Path, validation_fraction: float, seed: int, shard_bytes: int, overwrite: bool, console: Console
) -> list[Manifest]:
    """Makes an image corpus, which appears whole or not at all.

    Validation images are chosen by a hash of their bytes, so that copies of one are on one side; the others are
    shuffled over all shards. The same source and settings give the same bytes.

    Raises:
        DataError: no images, one that can't be opened, or an output folder that holds something else.

    Cost: reads every image twice.
    """
    check_replaceable(out, CLASSES_FILE)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise DataError(f"{out} holds an image corpus already; give --overwrite to make it again, or another folder")
    classes, sources = find_images(source)
    is_validation = np.array([hash_image(each.read()) for each in sources]) / 2.0**64 < validation_fraction
    chosen = {"train": np.flatnonzero(~is_validation), "validation": np.flatnonzero(is_validation)}
    if not len(chosen["train"]):
        raise DataError(f"{source}: no image is left for training; lower --validation-fraction {validation_fraction}")
    names = json.dumps({"classes": list(classes)}, indent=1, ensure_ascii=False).encode() + b"\n"
    with partial_folder(out, kept="*.kept") as folder:
        clear_folder(folder)
        write_file(folder / CLASSES_FILE, names)
        for split, numbers in chosen.items():
            if not len(numbers):
                continue
            order = numbers[np.argsort(derive_key(seed, IMAGE_KEY, numbers), kind="stable")]
            total_bytes = sum(sources[number].size for number in numbers)
            with track_bytes(console, f"write {split}", total_bytes) as advance:
                samples = read_samples([sources[number] for number in order], advance)
                shards = write_image_shards(folder / split, samples, shard_bytes)
            write_index(
                folder / split, shards, split=split, dtype="uint8", vocab_size=len(classes), eos_id=0, text_bytes=0,
                tokenizer_file=CLASSES_FILE, tokenizer_sha256=hashlib.sha256(names).hexdigest(),
            )
        replace_folder(folder, out)
    return [load_manifest(str(out), split) for split, numbers in chosen.items() if len(numbers)]


def read_samples(sources: Sequence[Source], advance) -> Iterator[tuple[int, str, bytes]]:
    """Yields (class, extension, encoded image); raises DataError for one that isn't an image."""
    for source in sources:
        content = source.read()
        advance(len(content))
        yield source.label, extension_of(content, source.place), content


def extension_of(content: bytes, place: str) -> str:
    """The extension for an encoded image, from its first bytes. Its pixels aren't decoded: `data verify` does that.

    Raises:
        DataError: no image of a known format.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return EXTENSIONS[image.format]
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: isn't a {', '.join(FORMATS)} image ({error}); remove it or mend it") from None


def hash_image(content: bytes) -> int:
    """A number below 2^64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def find_images(source: str) -> tuple[list[str], list[Source]]:
    """The names of the classes and the images of a source, in an order that is the same on every machine.

    Raises:
        DataError: no such source, or no images in it.
    """
    if source == DIGITS and not Path(source).exists():
        return digit_images()
    path = Path(source)
    tars = [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar"))
    classes, sources = tar_images(tars) if tars else folder_images(path)
    if not sources:
        raise DataError(
            f"{source} holds no images; give a folder with a folder of {', '.join(SUFFIXES)} files for each class,"
            f" WebDataset tars with .cls members, or the word {DIGITS}"
        )
    return classes, sources


def folder_images(folder: Path) -> tuple[list[str], list[Source]]:
    """Images whose folder is their class; classes are numbered in the order of their names."""
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    sources = [
        Source(path, 0, path.stat().st_size, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    return classes, sources


def tar_images(tars: Sequence[Path]) -> tuple[list[str], list[Source]]:
    """Images of WebDataset tars with their `.cls` members, whose numbers are the names of the classes too.

    Raises:
        DataError: a damaged tar, or an image without a class.
    """
    sources, most = [], -1
    for path in tars:
        found: dict[str, dict[str, tuple[int, int, bytes]]] = {}
        with path.open("rb") as file:
            for member in walk_tar(file, str(path)):
                key, extension = base_plus_ext(member.name)
                kind = "cls" if extension == "cls" else "image" if f".{extension}".lower() in SUFFIXES else None
                if key and kind:
                    content = file.read(member.size) if kind == "cls" and member.size <= LABEL_DIGITS else b""
                    found.setdefault(key, {})[kind] = (member.offset, member.size, content)
        for key, parts in found.items():
            if "image" in parts:
                label = parts.get("cls", (0, 0, b""))[2].strip()
                if not label.isdigit():
                    raise DataError(f"{path}: image {key} has no {key}.cls with the number of its class")
                sources.append(Source(path, *parts["image"][:2], int(label)))
                most = max(most, int(label))
    return [str(number) for number in range(most + 1)], sources


def digit_images() -> tuple[list[str], list[Source]]:
    """The 1,797 handwritten digits that scikit-learn ships, 8 x 8 grey pixels each (Alpaydin and Kaynak 1998).

    Raises:
        DataError: scikit-learn isn't installed.
    """
    try:
        from sklearn.datasets import load_digits  # an optional package
    except ImportError:
        raise DataError("the digits come with scikit-learn; install it with: pip install scikit-learn") from None
    digits, sources = load_digits(), []
    for pixels, label in zip(digits.images, digits.target.tolist(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(np.round(pixels * (255 / DIGIT_LEVELS)).astype(np.uint8)).save(buffer, "PNG")
        sources.append(Source(None, 0, len(buffer.getvalue()), label, buffer.getvalue()))
    return [str(number) for number in range(10)], sources
