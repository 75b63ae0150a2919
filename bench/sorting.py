"""Makes pairs of lines for `megascale data pairs`: letters in any order, and the same letters sorted.

Usage: python -m bench.sorting FILE.jsonl
"""

import json
import random
import sys
from pathlib import Path

NUM_PAIRS = 60_000
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = (4, 10)


def sorting_pairs(num_pairs: int, seed: int) -> list[tuple[str, str]]:
    """Lines of 4 to 10 letters drawn alike, each with its letters in the alphabet's order."""
    draw = random.Random(seed)
    lines = ("".join(draw.choices(LETTERS, k=draw.randint(*LENGTHS))) for _ in range(num_pairs))
    return [(line, "".join(sorted(line))) for line in lines]


def main() -> None:
    pairs = sorting_pairs(NUM_PAIRS, seed=0)
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
