"""Bytes that a rank holds, measured and in closed form: `python -m bench.memory`.

The state table holds every storage that an engine refers to after the last backward pass of a step, DeepSpeed's bucket
of a fixed size apart; the activation table what is alive after a block's forward pass and wasn't before. On a GPU the
second is the allocator's figure.
"""

import argparse
import json

from bench.figures import describe_machine, show_head
from bench.layout_cases import LayoutCase, by_name
from launcher.local import run_local

LLAMA = {
    "family": "llama", "num_layers": 3, "d_model": 256, "num_heads": 4, "num_kv_heads": 2, "d_ff": 512,
    "vocab_size": 1024, "max_seq_len": 64,
}
GPT2 = {"family": "gpt2", "num_layers": 3, "d_model": 256, "num_heads": 4, "vocab_size": 1024, "max_seq_len": 64}
OTHERS = {
    "palm": {"family": "palm", "num_layers": 3, "d_model": 256, "num_heads": 4, "num_kv_heads": 2, "d_ff": 512,
             "vocab_size": 1024, "max_seq_len": 64},
    "llama with wide normed heads": LLAMA | {"head_width": 96, "qk_norm": True},
    "bert": GPT2 | {"family": "bert"},
    "transformer": GPT2 | {"family": "transformer", "num_layers": 1},
}
"""Families whose blocks keep other things."""
STATE_COLUMNS = ("layout", "parameters", "ZeRO's formula", "ours", "measured", "measured / ours")
KEPT_COLUMNS = ("layout", "Korthikanti", "ours", "measured", "measured / ours")


def case(name: str, ranks: int, model: dict = LLAMA, dtype: str = "bf16", recompute: str = "none",
         block: int = 0, **parallel) -> LayoutCase:
    """A layout with 8 rows a step."""
    return LayoutCase(name, ranks, model, 8, 64, {"zero_stage": 1} | parallel, {"recompute": recompute}, dtype, block)


STATE_CASES = by_name([
    *(case(f"dp2 zero{stage} {dtype}", 2, zero_stage=stage, dtype=dtype)
      for stage in range(4) for dtype in ("fp32", "bf16")),
    case("tp2 zero1", 2, tp=2),
    case("pp2 zero1", 2, GPT2, pp=2),
    case("tp2 dp2 zero1", 4, tp=2),
    case("tp2 dp2 zero3", 4, tp=2, zero_stage=3),
    *(case(f"{name}, dp2 zero3", 2, model, zero_stage=3) for name, model in OTHERS.items() if name != "bert"),
])
KEPT_CASES = by_name([
    *(case(f"{family}, {recompute}, {dtype}", 1, model, dtype, recompute)
      for family, model in (("llama", LLAMA), ("gpt2", GPT2)) for dtype in ("fp32", "bf16")
      for recompute in ("none", "selective", "full")),
    *(case(f"{family}, {recompute}, tp2{how}", 2, model, "bf16", recompute, tp=2, sequence_parallel=is_sharded)
      for family, model in (("llama", LLAMA), ("gpt2", GPT2)) for recompute in ("none", "selective", "full")
      for how, is_sharded in (("", True), (" without sequence shards", False))),
    *(case(f"{name}, {recompute}, fp32", 1, model, "fp32", recompute) for name, model in OTHERS.items()
      for recompute in ("none", "selective")),
    *(case(f"decoder of transformer, {recompute}, fp32", 1, OTHERS["transformer"], "fp32", recompute, block=1)
      for recompute in ("none", "selective")),
    *(case(f"palm, {recompute}, tp2{how}", 2, OTHERS["palm"], "bf16", recompute, tp=2, sequence_parallel=is_sharded)
      for recompute in ("none", "selective", "full")
      for how, is_sharded in (("", True), (" without sequence shards", False))),
    case("transformer, none, tp2", 2, OTHERS["transformer"], "bf16", tp=2),
])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=("state", "kept"), default=["state", "kept"])
    print(describe_machine(["torch", "deepspeed"]))
    for table in parser.parse_args().tables:
        cases, columns = {"state": (STATE_CASES, STATE_COLUMNS), "kept": (KEPT_CASES, KEPT_COLUMNS)}[table]
        what = {"state": "training state, after the last backward pass of a step", "kept": "kept by one block"}[table]
        print(f"\nBytes on rank 0, {what}\n\n{show_head(columns)}", flush=True)
        for ranks in sorted({case.ranks for case in cases.values()}):
            names = [name for name, case in cases.items() if case.ranks == ranks]
            run_local([json.dumps({"table": table, "cases": names, "prints": "table"})], ranks, "bench.memory_rank")


if __name__ == "__main__":
    main()
