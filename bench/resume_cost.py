"""What it costs to find the first batch of a resumed run of 10 trillion tokens: `python -m bench.resume_cost`.

Writes the index and the table of shards of seven corpora, 150,000 shards of 2^26 tokens in all, without the shards
themselves. For each position a fresh process opens them, builds the order, and locates the rows that one replica of
1024 reads in the first step: shard, and the tokens within it. Memory is the peak of the process over what it held
after its imports, whose time is given apart. Positions alternate; processor time says what a busy machine adds.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from bench.figures import describe_machine, show_head, show_row
from megascale.data.manifest import INDEX_FILE, TABLE_DTYPE, TABLE_FILE, Index, index_bytes, load_manifest, table_bytes
from megascale.data.mixture import PERIOD, MixtureStage
from megascale.data.order import CorpusShape, RowOrder
from megascale.data.packing import Packing, count_concat_rows

COLUMNS = (
    "position", "first row", "opening, ms", "order, ms", "first batch, ms", "together, ms", "processor, ms",
    "memory, MB",
)
SHARES = {"books": 0.05, "code": 0.2, "forums": 0.1, "math": 0.03, "papers": 0.1, "web": 0.5, "wiki": 0.02}
NUM_SHARDS, SHARD_TOKENS, SHARD_DOCUMENTS = 150_000, 1 << 26, 90_000
SEQ_LEN, STEP_ROWS, REPLICA, NUM_REPLICAS = 8192, 2048, 17, 1024
POSITIONS = (0.0, 0.1, 0.5, 0.99)
PACKING = Packing("concat", SEQ_LEN + 1)


def write_corpora(folder: Path) -> None:
    """Writes the index and the table of each corpus; the hashes of shards that don't exist are random."""
    random = np.random.default_rng(0)
    for name, share in SHARES.items():
        table = np.zeros(round(NUM_SHARDS * share), TABLE_DTYPE)
        table["number"] = np.arange(len(table))
        table["tokens"] = SHARD_TOKENS - random.integers(1 << 20, size=len(table))
        table["bytes"] = 2 * table["tokens"] + (1 << 20)
        table["documents"], table["blocks"], table["index_bytes"] = SHARD_DOCUMENTS, 64, 4096
        table["sha256"] = random.integers(256, size=(len(table), 32))
        content = table_bytes(table)
        index = Index(
            format_version=2, split="train", dtype="uint16", vocab_size=50_000, eos_id=0,
            text_bytes=4 * int(table["tokens"].sum()), tokenizer_file="tokenizer.json", tokenizer_sha256="0" * 64,
            num_shards=len(table), num_tokens=int(table["tokens"].sum()), num_documents=int(table["documents"].sum()),
            table_sha256=hashlib.sha256(content).hexdigest(),
        )
        split = folder / name / "train"
        split.mkdir(parents=True)
        (split / TABLE_FILE).write_bytes(content)
        (split / INDEX_FILE).write_bytes(index_bytes(index))


def measure(folder: Path, position: float) -> dict[str, float]:
    """Times a resume in this process, which has done nothing else: seconds, bytes, and the row resumed from."""
    held, start, start_cpu = memory_bytes("VmRSS"), time.perf_counter(), time.process_time()
    manifests = [load_manifest(str(folder / name), "train") for name in SHARES]
    opened = time.perf_counter()
    shapes = [
        CorpusShape(name, count_concat_rows(manifest.table["tokens"], PACKING))
        for name, manifest in zip(SHARES, manifests, strict=True)
    ]
    order = RowOrder(shapes, [MixtureStage(0, share_out())], seed=1)
    first_row = int(position * sum(order.num_rows)) // STEP_ROWS * STEP_ROWS
    built = time.perf_counter()
    places = order.locate(order.replica_rows(first_row, STEP_ROWS, REPLICA, NUM_REPLICAS))
    begins = places.rows * SEQ_LEN
    shards = [manifests[c].shard_place(s) for c, s in zip(places.corpora.tolist(), places.shards.tolist(), strict=True)]
    stop, stop_cpu = time.perf_counter(), time.process_time()
    assert len(shards) == len(begins) == STEP_ROWS // NUM_REPLICAS
    return {
        "first_row": first_row, "open_s": opened - start, "order_s": built - opened, "batch_s": stop - built,
        "together_s": stop - start, "cpu_s": stop_cpu - start_cpu, "bytes": memory_bytes("VmHWM") - held,
    }


def share_out() -> tuple[int, ...]:
    """The shares as counts of a period; what rounding leaves goes to the largest."""
    counts = {name: int(share * PERIOD) for name, share in SHARES.items()}
    counts[max(SHARES, key=SHARES.get)] += PERIOD - sum(counts.values())
    return tuple(counts.values())


def memory_bytes(field: str) -> int:
    """`VmRSS`, what this process holds, or `VmHWM`, its peak. Not ru_maxrss, which begins at the parent's peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def run_fresh(folder: Path, position: float) -> dict[str, float]:
    """`measure` in a fresh process, and the seconds that it took to start and import."""
    command = [sys.executable, "-m", "bench.resume_cost", "--measure", str(folder), str(position)]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    wall_s, figures = time.perf_counter() - start, json.loads(result.stdout)
    return {**figures, "import_s": wall_s - figures["together_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each position")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "POSITION"), help="used by the command itself")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), float(options.measure[1]))))
        return
    print(describe_machine(["numpy", "pydantic"]))
    print(f"{NUM_SHARDS:,} shards in {len(SHARES)} corpora, seq_len {SEQ_LEN}, replica {REPLICA} of {NUM_REPLICAS}; "
          f"medians of {options.repeats} fresh processes\n")
    with tempfile.TemporaryDirectory() as folder:
        write_corpora(Path(folder))
        runs = [[run_fresh(Path(folder), position) for position in POSITIONS] for _ in range(options.repeats)]
    print(show_head(COLUMNS))
    for number, position in enumerate(POSITIONS):
        middle = {key: median(run[number][key] for run in runs) for key in runs[0][number]}
        milliseconds = [f"{1e3 * middle[key]:.0f}" for key in ("open_s", "order_s", "batch_s", "together_s", "cpu_s")]
        print(show_row([f"{position:.0%}", f"{middle['first_row']:,}", *milliseconds, f"{middle['bytes'] / 1e6:.0f}"]))
    import_s = median(figures["import_s"] for run in runs for figures in run)
    print(f"\nstart of Python and imports, beside that: {import_s:.2f} s")


if __name__ == "__main__":
    main()
