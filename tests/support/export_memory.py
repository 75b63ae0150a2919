"""Exports a run and prints by how many bytes memory rose above what it was before: a process of its own."""

import re
import sys
from pathlib import Path

from megascale.export.hf_export import export_run

MAX_SHARD_BYTES = 5 * 10**9


def memory_bytes(name: str) -> int:
    """VmRSS or VmHWM of this process."""
    return int(re.search(rf"{name}:\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main(small: Path, large: Path) -> None:
    export_run(small, None, None, "float32", MAX_SHARD_BYTES)  # so that what is loaded and kept once doesn't count
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before = memory_bytes("VmRSS")
    export_run(large, None, None, "float32", MAX_SHARD_BYTES)
    print(memory_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
