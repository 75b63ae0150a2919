"""Text to a tokenized corpus: tokenizer, tokens, shards and index, in a folder that appears whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from data_tools.corpora import ReadCounts, Source, read_documents
from data_tools.output_folder import check_replaceable, partial_folder, replace_folder
from data_tools.progress import track_bytes
from data_tools.settings import BuildSettings
from data_tools.spill import SplitSpill
from data_tools.tokenize import hash_text, tokenize_documents
from data_tools.tokenizer import check_vocab_size, count_ids, find_eos_id, train_tokenizer
from data_tools.write_shards import write_file, write_index, write_shards
from megascale.data.manifest import FORMAT_VERSION, Manifest, check_corpus, load_manifest
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError

BUILD_FILE = "build.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SAMPLE_BYTES = 1 << 28
"""Source bytes that a tokenizer is trained on at most: merges change little beyond, time and memory do."""


@dataclass(frozen=True)
class BuildSummary:
    """What a build made, or found made already."""

    splits: tuple[Manifest, ...]
    documents: int
    empty: int
    bad_utf8: int
    bad_utf8_files: list[str]
    is_new: bool

    def describe(self) -> str:
        """The summary as lines for people."""
        lines = [f"corpus {self.splits[0].folder}: {'built' if self.is_new else 'found finished, nothing to do'}"]
        for split in self.splits:
            lines.append(
                f"  {split.split}: {split.num_documents:,} documents, {split.text_bytes:,} bytes of text, "
                f"{split.num_tokens:,} tokens of {split.vocab_size:,} ids ({split.text_bytes / split.num_tokens:.2f} "
                f"bytes per token), {len(split.shards)} shards"
            )
        if self.empty:
            lines.append(f"  dropped {self.empty} empty documents")
        if self.bad_utf8:
            names = ", ".join(self.bad_utf8_files) + (", ..." if self.bad_utf8 > len(self.bad_utf8_files) else "")
            lines.append(f"  replaced bytes that aren't UTF-8 in {self.bad_utf8} documents ({names})")
        return "\n".join(lines)


def build_corpus(
    source: Source,
    out: Path,
    settings: BuildSettings,
    workers: int,
    console: Console,
    tokenizer_path: Path | None = None,
    overwrite: bool = False,
) -> BuildSummary:
    """Builds a corpus, or recognises that `out` holds it.

    Args:
        source: the text.
        out: folder to make.
        settings: how.
        workers: processes that tokenize; the result doesn't depend on it.
        console: where progress is shown.
        tokenizer_path: a tokenizer to use; without it one is trained on the training split's text.
        overwrite: replace another corpus at `out`.

    Raises:
        DataError: unusable settings or text, `out` holds something else, or it can't be written.
    """
    check_settings(settings, workers)
    if tokenizer_path is None:
        check_vocab_size(settings.vocab_size)
    else:
        find_eos_id(load_tokenizer(tokenizer_path), settings.eos_token, tokenizer_path)
    given = None if tokenizer_path is None else hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    recipe = {**asdict(settings), "tokenizer_sha256": given, "source": source.fingerprint}
    check_replaceable(out, BUILD_FILE)
    if not overwrite and (out / BUILD_FILE).exists():
        return find_finished(out, recipe)
    with partial_folder(out) as partial:
        if tokenizer_path is None:
            write_tokenizer(source, settings, console, partial / TOKENIZER_FILE)
        else:
            write_file(partial / TOKENIZER_FILE, tokenizer_path.read_bytes())
        counts = tokenize_source(source, settings, partial, workers, console)
        record = json.dumps({"recipe": recipe, "counts": asdict(counts)}, indent=1)
        write_file(partial / BUILD_FILE, f"{record}\n".encode())
        replace_folder(partial, out)
    return summarize(out, counts, is_new=True)


def check_settings(settings: BuildSettings, workers: int) -> None:
    """Refuses settings without meaning."""
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"--validation-fraction {settings.validation_fraction} is not in [0, 1); 0.05 is usual")
    for name in ("shard_tokens", "block_tokens"):
        if getattr(settings, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(settings, name)} is below 1")
    if workers < 1:
        raise DataError(f"--workers {workers} is below 1")


def find_finished(out: Path, recipe: dict) -> BuildSummary:
    """The summary of the finished build at `out`, if it was made by the same recipe.

    Raises:
        DataError: it was made by another recipe, or files of it are missing.
    """
    path = out / BUILD_FILE
    try:
        build = json.loads(path.read_bytes())
        found, counts = build["recipe"], ReadCounts(**build["counts"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} can't be read; build again with --overwrite or choose another --out") from None
    differing = [
        f"{key} = {found.get(key)!r} there, {recipe[key]!r} asked" for key in recipe if found.get(key) != recipe[key]
    ]
    if differing:
        raise DataError(
            f"{out} holds another corpus ({'; '.join(differing)}); build with --overwrite or choose another --out"
        )
    summary = summarize(out, counts, is_new=False)
    for manifest in summary.splits:
        check_corpus(manifest, manifest.vocab_size)
    return summary


def summarize(out: Path, counts: ReadCounts, is_new: bool) -> BuildSummary:
    """The summary of a corpus on disk."""
    splits = [split for split in ("train", "validation") if split == "train" or (out / split).exists()]
    return BuildSummary(tuple(load_manifest(out, split) for split in splits), **asdict(counts), is_new=is_new)


def write_tokenizer(source: Source, settings: BuildSettings, console: Console, path: Path) -> None:
    """Trains a tokenizer on the training split's text, or a sample of it, and writes it."""
    check_vocab_size(settings.vocab_size)
    counts, total_bytes = ReadCounts(), source.num_bytes
    sample_fraction = TOKENIZER_SAMPLE_BYTES / max(1, total_bytes)

    def choose_texts(advance: Callable[[int], None]) -> Iterator[str]:
        for document in read_documents(source, counts):
            advance(document.source_bytes)
            split_value, sample_value = hash_text(document.text)
            if split_value >= settings.validation_fraction and sample_value < sample_fraction:
                yield document.text

    with track_bytes(console, "train tokenizer", total_bytes) as advance:
        tokenizer = train_tokenizer(choose_texts(advance), settings.vocab_size)
    check_documents(source, counts)
    write_file(path, tokenizer.to_str(pretty=True).encode())


def tokenize_source(
    source: Source, settings: BuildSettings, folder: Path, workers: int, console: Console
) -> ReadCounts:
    """Tokenizes a source with the tokenizer in `folder` and writes its splits there."""
    path = folder / TOKENIZER_FILE
    tokenizer = load_tokenizer(path)
    eos_id, vocab_size = find_eos_id(tokenizer, settings.eos_token, path), count_ids(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    spills = {split: SplitSpill(folder / f"{split}.spill", dtype) for split in ("train", "validation")}
    counts = ReadCounts()
    with track_bytes(console, "tokenize", source.num_bytes) as advance:
        with closing(tokenize_documents(read_documents(source, counts), path, eos_id, workers)) as batches:
            for batch in batches:
                is_validation = batch.split_values < settings.validation_fraction
                spills["train"].append(batch, ~is_validation)
                spills["validation"].append(batch, is_validation)
                advance(batch.source_bytes)
    check_documents(source, counts)
    check_splits(source, settings, counts, {split: spill.num_documents for split, spill in spills.items()})
    tokenizer_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for split, spill in spills.items():
        if spill.num_documents:
            documents = spill.documents(settings.seed)
            shards = write_shards(folder / split, documents, dtype, settings.shard_tokens, settings.block_tokens)
            manifest = Manifest(
                folder=folder,
                format_version=FORMAT_VERSION,
                split=split,
                dtype=dtype.name,
                vocab_size=vocab_size,
                eos_id=eos_id,
                text_bytes=spill.text_bytes,
                tokenizer_file=TOKENIZER_FILE,
                tokenizer_sha256=tokenizer_sha256,
                shards=shards,
            )
            write_index(manifest)
        spill.remove()
    return counts


def check_documents(source: Source, counts: ReadCounts) -> None:
    """Refuses a source without text."""
    if counts.documents == 0:
        raise DataError(
            f"source {source.root} has no document with text: {len(source.files)} files hold {counts.empty} empty "
            f"documents; give another source or --pattern"
        )


def check_splits(source: Source, settings: BuildSettings, counts: ReadCounts, documents: dict[str, int]) -> None:
    """Refuses a split that was asked for and got no document."""
    for split, number in documents.items():
        if number == 0 and (split == "train" or settings.validation_fraction > 0):
            raise DataError(
                f"--validation-fraction {settings.validation_fraction} of {counts.documents} documents leaves the "
                f"{split} split empty; choose another fraction (0: no validation split), or cut the text files of "
                f"{source.root} into more documents by --separator"
            )
