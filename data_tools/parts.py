"""Parts of a corpus that the tasks of a job array make, each a small corpus of its own within the folder to be."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megascale.errors import DataError

PARTS_FOLDER = ".parts"
SLURM = "slurm"


class Part(NamedTuple):
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"part-{self.index:05d}-of-{self.count:05d}"


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """The part that `--array` asks for: `i/n`, or `slurm` for the task of a job array that this process is.

    Raises:
        DataError: neither of them, or an array of which the tasks aren't 0 to n - 1.
    """
    if text == SLURM:
        return _slurm_part(environment)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise DataError(f"--array {text!r} is neither i/n with i from 0 to n - 1, such as 0/32, nor the word {SLURM}")
    return Part(int(match[1]), int(match[2]))


def _slurm_part(environment: Mapping[str, str]) -> Part:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    missing = [name for name in names if not environment.get(name, "").isdigit()]
    if missing:
        raise DataError(f"--array {SLURM} needs a job array ({missing[0]} isn't set); submit with: sbatch --array=0-31")
    number, first, last, count = (int(environment[name]) for name in names)
    if (first, last) != (0, count - 1):
        raise DataError(
            f"--array {SLURM}: the job array has {count} tasks, {first} to {last}, and parts are counted from 0 "
            f"without gaps; submit with --array=0-{max(last, count - 1)}, or give a single part again as --array i/n"
        )
    return Part(number, count)


def check_part(out: Path, part: Part) -> Path:
    """The folder of a part within `out`.

    Raises:
        DataError: parts of another number are there.
    """
    others = sorted(
        path.name for path in (out / PARTS_FOLDER).glob("part-*") if not path.name.endswith(f"-of-{part.count:05d}")
    )
    if others:
        raise DataError(
            f"{out / PARTS_FOLDER} holds parts of an array of another size ({others[0]}), asked is {part.name}; give "
            f"the same n to all parts, or remove {out / PARTS_FOLDER} to start over"
        )
    return out / PARTS_FOLDER / part.name


def find_parts(out: Path) -> list[Path]:
    """The folders of all parts of `out`, in their order.

    Raises:
        DataError: there are none, or some are missing.
    """
    found = sorted((out / PARTS_FOLDER).glob("part-*-of-*"))
    if not found:
        raise DataError(
            f"{out} holds no parts (no {out / PARTS_FOLDER}); make them with: megascale data tokenize SOURCE "
            f"--tokenizer tokenizer.json --out {out} --array i/n"
        )
    count = int(found[-1].name[-5:])
    expected = [out / PARTS_FOLDER / Part(index, count).name for index in range(count)]
    missing = [path.name for path in expected if path not in found]
    strange = [path.name for path in found if path not in expected]
    if missing or strange:
        raise DataError(
            f"{out} can't be merged: of {count} parts, {len(missing)} aren't finished ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''})"
            + (f", and {strange[0]} is of another array" if strange else "")
            + f"; make them with --array i/{count}"
        )
    return expected
