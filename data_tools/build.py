"""Text to a tokenized corpus: tokenizer, tokens, shards and index, in a folder that appears whole or not at all.

Work is kept chunk by chunk beside the folder, so a build that was killed goes on where it was, and ends with the same
bytes.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from data_tools.build_summary import BUILD_FILE, BuildSummary, compare_recipes, find_finished, read_recipe, summarize
from data_tools.chunks import ChunkedDocuments, choose_chunk_bytes, is_finished, read_facts
from data_tools.corpora import Piece, Source, cut_source
from data_tools.engine import Engine, choose_engine
from data_tools.output_folder import check_replaceable, clear_folder, partial_folder, replace_folder
from data_tools.parts import PARTS_FOLDER, Part, check_part
from data_tools.progress import track_bytes
from data_tools.readers import PAIR_SEPARATOR, ReadCounts, read_documents
from data_tools.settings import BuildSettings
from data_tools.splits import SPLITS, TOKENIZER_FILE, choose_documents, write_split
from data_tools.tokenize import TokenizeJob, hash_text, tokenize_chunks
from data_tools.tokenizer import (
    character_tokenizer,
    check_special_names,
    check_special_tokens,
    check_vocab_size,
    count_ids,
    find_eos_id,
    train_tokenizer,
)
from data_tools.write_shards import write_file
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError

CHUNK_FOLDER, RECIPE_FILE = "chunks", "recipe.json"
TOKENIZER_SAMPLE_BYTES = 1 << 28
"""Source bytes that a tokenizer is trained on at most: merges change little beyond, time and memory do."""


def build_corpus(
    source: Source,
    out: Path,
    settings: BuildSettings,
    workers: int,
    console: Console,
    tokenizer_path: Path | None = None,
    overwrite: bool = False,
    part: Part | None = None,
    allow_fast: bool = True,
) -> BuildSummary:
    """Builds a corpus, goes on building it, or recognises that `out` holds it.

    Args:
        source: the text.
        out: folder to make.
        settings: how.
        workers: processes that tokenize; the result doesn't depend on it.
        console: where progress is shown.
        tokenizer_path: a tokenizer to use; without it one is trained on the training split's text.
        overwrite: replace another corpus at `out`.
        part: make this part of the corpus only, within `out`; needs a tokenizer.
        allow_fast: use tiktoken where its ids agree; the result doesn't depend on it.

    Raises:
        DataError: unusable settings or text, `out` holds something else, or it can't be written.
    """
    started_s = time.monotonic()
    check_settings(settings, workers, tokenizer_path)
    recipe = describe_recipe(source, settings, tokenizer_path, part)
    check_replaceable(out, BUILD_FILE, *([PARTS_FOLDER] if part else []))
    if not overwrite and (out / BUILD_FILE).exists():
        return find_finished(out, recipe)
    if part is not None:
        out = check_part(out, part)
        if (out / BUILD_FILE).exists():
            return find_finished(out, recipe)
    engine = None
    with partial_folder(out, kept=f"{CHUNK_FOLDER}/*.json") as partial:
        resume_or_clear(partial, recipe, console)
        if not (partial / BUILD_FILE).exists():
            write_tokenizer_file(source, settings, console, partial / TOKENIZER_FILE, tokenizer_path)
            engine = tokenize_source(source, settings, partial, workers, console, part, allow_fast)
            counts = write_splits(source, settings, partial, console, part)
            record = json.dumps({"recipe": recipe, "counts": asdict(counts)}, indent=1)
            write_file(partial / BUILD_FILE, f"{record}\n".encode())
        (partial / RECIPE_FILE).unlink(missing_ok=True)
        shutil.rmtree(partial / CHUNK_FOLDER, ignore_errors=True)
        replace_folder(partial, out)
    return replace(summarize(out), seconds=time.monotonic() - started_s, engine=engine)


def check_settings(settings: BuildSettings, workers: int, tokenizer_path: Path | None) -> None:
    """Refuses settings without meaning."""
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"--validation-fraction {settings.validation_fraction} is not in [0, 1); 0.05 is usual")
    for name in ("shard_tokens", "block_tokens"):
        if getattr(settings, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(settings, name)} is below 1")
    if workers < 1:
        raise DataError(f"--workers {workers} is below 1")
    if tokenizer_path is None and settings.characters:
        check_special_names(settings.special_tokens)
    elif tokenizer_path is None:
        check_vocab_size(settings.vocab_size, settings.special_tokens)
    else:
        tokenizer = load_tokenizer(tokenizer_path)
        find_eos_id(tokenizer, settings.eos_token, tokenizer_path)
        check_special_tokens(tokenizer, settings.special_tokens, tokenizer_path)


def describe_recipe(
    source: Source, settings: BuildSettings, tokenizer_path: Path | None, part: Part | None
) -> dict[str, object]:
    """All that a corpus depends on, as JSON gives it back."""
    given = None if tokenizer_path is None else hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    array = None if part is None else part.count
    recipe = {**asdict(settings), "tokenizer_sha256": given, "source": source.fingerprint, "array": array}
    return json.loads(json.dumps(recipe))


def resume_or_clear(partial: Path, recipe: dict, console: Console) -> None:
    """Keeps what an earlier build by the same recipe left, and removes what another one did."""
    found = read_recipe(partial / BUILD_FILE) or read_recipe(partial / RECIPE_FILE)
    if found == recipe:
        for split in SPLITS:
            if not (partial / BUILD_FILE).exists():
                shutil.rmtree(partial / split, ignore_errors=True)
        return
    if found is not None:
        console.print(f"starting over: {'; '.join(compare_recipes(found, recipe))}", highlight=False)
    clear_folder(partial)
    (partial / CHUNK_FOLDER).mkdir()
    write_file(partial / RECIPE_FILE, json.dumps(recipe).encode())


def write_tokenizer_file(
    source: Source, settings: BuildSettings, console: Console, path: Path, given: Path | None
) -> None:
    """Trains or copies the tokenizer of a corpus, unless an interrupted build has."""
    if path.exists():
        return
    if given is None:
        write_tokenizer(source, settings, console, path)
    else:
        write_file(path, given.read_bytes())


def write_tokenizer(source: Source, settings: BuildSettings, console: Console, path: Path) -> None:
    """Trains a tokenizer on the training split's text, or a sample of it, and writes it; characters are of all text."""
    if not settings.characters:
        check_vocab_size(settings.vocab_size, settings.special_tokens)
    counts, total_bytes = ReadCounts(), source.num_bytes
    sample_fraction = TOKENIZER_SAMPLE_BYTES / max(1, total_bytes)

    def choose_texts(advance: Callable[[int], None]) -> Iterator[str]:
        for document in read_documents(source, counts):
            advance(document.source_bytes)
            split_value, sample_value = (number / 2**64 for number in hash_text(document.text.encode()))
            is_learnt_from = split_value >= settings.validation_fraction and sample_value < sample_fraction
            if settings.characters or is_learnt_from:
                yield from document.text.split(PAIR_SEPARATOR) if source.target_field else (document.text,)

    with track_bytes(console, "train tokenizer", total_bytes) as advance:
        if settings.characters:
            tokenizer = character_tokenizer(choose_texts(advance), settings.special_tokens)
        else:
            tokenizer = train_tokenizer(choose_texts(advance), settings.vocab_size, settings.special_tokens)
    check_documents(source, counts)
    write_file(path, tokenizer.to_str(pretty=True).encode())


def list_chunks(source: Source, settings: BuildSettings, part: Part | None) -> dict[int, tuple[Piece, ...]]:
    """The chunks that a build reads, by number. Where copies are dropped, each part reads all of them."""
    chunks = dict(enumerate(cut_source(source, choose_chunk_bytes(source.num_bytes))))
    if part is None or settings.deduplicate:
        return chunks
    return {number: pieces for number, pieces in chunks.items() if number % part.count == part.index}


def tokenize_source(
    source: Source,
    settings: BuildSettings,
    folder: Path,
    workers: int,
    console: Console,
    part: Part | None,
    allow_fast: bool,
) -> Engine:
    """Tokenizes the chunks that aren't tokenized yet with the tokenizer in `folder`."""
    path = folder / TOKENIZER_FILE
    chunks, chunk_folder = list_chunks(source, settings, part), folder / CHUNK_FOLDER
    missing = {number: pieces for number, pieces in chunks.items() if not is_finished(chunk_folder, number)}
    if 0 < len(missing) < len(chunks):
        console.print(f"going on: {len(chunks) - len(missing)} of {len(chunks)} chunks are done", highlight=False)
    engine = choose_engine(source, chunks, path, allow_fast)
    facts = token_facts(path, settings)
    job = TokenizeJob(
        source=replace(source, files=()),
        folder=chunk_folder,
        tokenizer_path=path,
        tokenizer_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        eos_id=facts["eos_id"],
        dtype=np.dtype(facts["dtype"]).newbyteorder("<"),
        use_fast=engine.is_fast,
        keep=(part.index, part.count) if part is not None and settings.deduplicate else (0, 1),
    )
    num_bytes = sum(piece.num_bytes for pieces in missing.values() for piece in pieces)
    with track_bytes(console, "tokenize", num_bytes) as advance:
        with closing(tokenize_chunks(job, missing, workers)) as finished:
            for size in finished:
                advance(size)
    disagreements = {number: read_facts(chunk_folder, number).disagreement for number in chunks}
    return engine.with_disagreements({n: text for n, text in disagreements.items() if text})


def token_facts(path: Path, settings: BuildSettings) -> dict[str, object]:
    """What a tokenizer makes of text, as `Index` says it."""
    tokenizer = load_tokenizer(path)
    vocab_size = count_ids(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    return {"dtype": dtype, "vocab_size": vocab_size, "eos_id": find_eos_id(tokenizer, settings.eos_token, path)}


def write_splits(
    source: Source, settings: BuildSettings, folder: Path, console: Console, part: Part | None
) -> ReadCounts:
    """Writes the shards of each split from the finished chunks, and adds up what was met."""
    facts, counts = token_facts(folder / TOKENIZER_FILE, settings), ReadCounts()
    chunks = list_chunks(source, settings, part)
    for number in chunks:
        counts.add(read_facts(folder / CHUNK_FOLDER, number).counts)
    documents = ChunkedDocuments(folder / CHUNK_FOLDER, chunks, np.dtype(facts["dtype"]).newbyteorder("<"))
    chosen, counts.duplicates = choose_documents(documents, settings)
    if part is None:
        check_documents(source, counts)
        check_splits(source, settings, counts, {split: len(numbers) for split, numbers in chosen.items()})
    for split, numbers in chosen.items():
        if len(numbers):
            write_split(folder, split, documents, numbers, settings, part.index if part else 0, console, **facts)
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
