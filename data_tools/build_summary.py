"""What a build made, or found made already."""

import json
from dataclasses import dataclass
from pathlib import Path

from data_tools.engine import Engine
from data_tools.readers import ReadCounts
from data_tools.settings import BuildSettings
from data_tools.splits import SPLITS
from megascale.data.manifest import INDEX_FILE, Manifest, check_shard_files, load_manifest, read_tokenizer
from megascale.errors import DataError

BUILD_FILE = "build.json"


@dataclass(frozen=True)
class BuildSummary:
    """What a corpus holds and what was met on the way.

    Attributes:
        out: its folder.
        splits: those that have documents.
        counts: what was met in the source.
        seconds: how long it took; None if it was found finished.
        engine: what tokenized it, if that was now.
    """

    out: Path
    splits: tuple[Manifest, ...]
    counts: ReadCounts
    seconds: float | None = None
    engine: Engine | None = None

    @property
    def is_new(self) -> bool:
        return self.seconds is not None

    def describe(self) -> str:
        """The summary as lines for people."""
        counts = self.counts
        lines = [f"corpus {self.out}: {'built' if self.is_new else 'found finished, nothing to do'}"]
        for split in self.splits:
            lines.append(
                f"  {split.split}: {split.num_documents:,} documents, {split.text_bytes:,} bytes of text, "
                f"{split.num_tokens:,} tokens of {split.vocab_size:,} ids ({split.text_bytes / split.num_tokens:.2f} "
                f"bytes per token), {split.num_shards} shards"
            )
        if not self.splits:
            lines.append("  no document fell to this part")
        if counts.empty:
            lines.append(f"  dropped {counts.empty} empty documents")
        if counts.duplicates:
            lines.append(f"  dropped {counts.duplicates} exact copies of other documents")
        if counts.bad_utf8:
            names = ", ".join(counts.bad_utf8_files) + (", ..." if counts.bad_utf8 > len(counts.bad_utf8_files) else "")
            lines.append(f"  replaced bytes that aren't UTF-8 in {counts.bad_utf8} documents ({names})")
        if self.engine:
            lines.append(f"  tokenized by {self.engine.reason}")
        if self.seconds is not None:
            speed = sum(split.num_tokens for split in self.splits) / max(self.seconds, 1e-3)
            lines.append(f"  {self.seconds:.1f} s, {speed:,.0f} tokens/s")
        return "\n".join(lines)


def find_finished(out: Path, recipe: dict) -> BuildSummary:
    """The summary of the finished build at `out`, if it was made by the same recipe.

    Raises:
        DataError: it was made by another recipe, or files of it are missing.
    """
    found = read_recipe(out / BUILD_FILE)
    if found is None:
        raise DataError(f"{out / BUILD_FILE} can't be read; build again with --overwrite or choose another --out")
    if differing := compare_recipes(found, recipe):
        raise DataError(
            f"{out} holds another corpus ({'; '.join(differing)}); build with --overwrite or choose another --out"
        )
    summary = summarize(out)
    for manifest in summary.splits:
        read_tokenizer(manifest)
        check_shard_files(manifest)
    return summary


def compare_recipes(found: dict, recipe: dict) -> list[str]:
    """How two recipes differ, field by field."""
    known = {key: getattr(BuildSettings, key, None) for key in recipe} | found  # older ones lack newer settings
    differing = [key for key in recipe if known[key] != recipe[key]]
    return [f"{key} = {known[key]!r} there, {recipe[key]!r} asked" for key in differing]


def read_recipe(path: Path) -> dict | None:
    """The recipe in a file, None where there is none to be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    recipe = content.get("recipe", content) if isinstance(content, dict) else None
    return recipe if isinstance(recipe, dict) else None


def summarize(out: Path) -> BuildSummary:
    """The summary of a corpus on disk."""
    try:
        counts = ReadCounts(**json.loads((out / BUILD_FILE).read_bytes())["counts"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{out / BUILD_FILE} can't be read; build again with --overwrite") from None
    splits = [split for split in SPLITS if (out / split / INDEX_FILE).exists()]
    return BuildSummary(out, tuple(load_manifest(str(out), split) for split in splits), counts)
