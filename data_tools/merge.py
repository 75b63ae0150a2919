"""Joins the parts of a job array into one corpus: shards are moved, tables and index written last.

Each step can be repeated, so a merge that was killed is finished by the same command.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from data_tools.build_summary import BUILD_FILE, BuildSummary, compare_recipes, read_recipe, summarize
from data_tools.output_folder import lock_folder
from data_tools.parts import PARTS_FOLDER, find_parts
from data_tools.readers import ReadCounts
from data_tools.splits import SPLITS, TOKENIZER_FILE
from data_tools.write_shards import fsync_folder, write_file, write_index
from megascale.data.manifest import INDEX_FILE, Manifest, load_manifest, read_tokenizer
from megascale.errors import DataError


def merge_parts(out: Path) -> BuildSummary:
    """Joins all parts of `out`, or recognises that they are joined.

    Raises:
        DataError: parts are missing, of another recipe or damaged, or the disk refuses a write.
    """
    try:
        if not (out / BUILD_FILE).exists():
            parts = find_parts(out)
            handle = os.open(out / PARTS_FOLDER, os.O_RDONLY)
            try:
                lock_folder(handle, out)
                join_parts(out, parts)
            finally:
                os.close(handle)
        shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
        return summarize(out)
    except OSError as error:
        raise DataError(f"{out} can't be merged ({error}); mend that and give the command again") from error


def join_parts(out: Path, parts: list[Path]) -> None:
    """Moves the shards of all parts and writes what declares them one corpus, `build.json` last."""
    recipe = check_one_recipe(parts)
    splits = {
        split: [load_manifest(str(part), split) for part in parts if (part / split / INDEX_FILE).exists()]
        for split in SPLITS
    }
    for split, manifests in splits.items():
        if not manifests and (split == "train" or recipe["validation_fraction"] > 0):
            raise DataError(f"{out}: no part has a document in the {split} split; tokenize with another split")
    tokenizer, counts = {read_tokenizer(manifest) for manifest in splits["train"]}, ReadCounts()
    if len(tokenizer) > 1:
        raise DataError(f"the parts of {out} were made with {len(tokenizer)} tokenizers; make them again with one")
    for part in parts:
        counts.add(summarize(part).counts)
    for split, manifests in splits.items():
        if manifests:
            move_shards(out / split, manifests)
    write_file(out / TOKENIZER_FILE, tokenizer.pop())
    for split, manifests in splits.items():
        if manifests:
            shards = [manifest.shard(position) for manifest in manifests for position in range(manifest.num_shards)]
            facts = manifests[0].index.model_dump(
                include={"split", "dtype", "vocab_size", "eos_id", "tokenizer_file", "tokenizer_sha256"}
            )
            write_index(out / split, shards, text_bytes=sum(m.text_bytes for m in manifests), **facts)
    write_file(out / BUILD_FILE, f"{json.dumps({'recipe': recipe, 'counts': asdict(counts)}, indent=1)}\n".encode())


def check_one_recipe(parts: list[Path]) -> dict:
    """The recipe that all parts were made by.

    Raises:
        DataError: there are two.
    """
    recipe = read_recipe(parts[0] / BUILD_FILE)
    for part in parts:
        found = read_recipe(part / BUILD_FILE)
        if found is None or recipe is None:
            raise DataError(f"{part / BUILD_FILE} can't be read; remove that part's folder and make it again")
        if differing := compare_recipes(found, recipe):
            raise DataError(
                f"{part} was made by another recipe than {parts[0].name} ({'; '.join(differing)}); remove one of them "
                "and make it again: all parts need one source and the same options"
            )
    return recipe


def move_shards(folder: Path, manifests: list[Manifest]) -> None:
    """Moves the shards of a split that aren't moved yet.

    Raises:
        DataError: one is missing or of another size than its part's table says.
    """
    folder.mkdir(exist_ok=True)
    for manifest in manifests:
        for position in range(manifest.num_shards):
            shard = manifest.shard(position)
            source, target = Path(manifest.shard_place(position)), folder / shard.name
            path = source if source.exists() else target
            size = path.stat().st_size if path.exists() else None
            if size != shard.bytes:
                found = "missing" if size is None else f"of {size} bytes"
                raise DataError(
                    f"shard {source} is {found}, its part's table says {shard.bytes} bytes; remove "
                    f"{source.parent.parent} and make that part again"
                )
            path.rename(target)
    fsync_folder(folder)
