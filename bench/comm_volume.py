"""Bytes that a rank sends in a step, counted and in closed form: `python -m bench.comm_volume`.

Every layout takes real steps on gloo ranks; `bench/comm_counter.py` counts what is sent, `bench/comm_forms.py` has the
forms. Both are the same to the byte on every rank, or the bench stops.
"""

import argparse
import json

from bench.figures import describe_machine
from bench.layout_cases import LayoutCase, by_name
from launcher.local import run_local

LLAMA = {
    "family": "llama", "num_layers": 4, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "d_ff": 128,
    "vocab_size": 250, "max_seq_len": 32,
}
GPT2 = {"family": "gpt2", "num_layers": 4, "d_model": 64, "num_heads": 4, "vocab_size": 250, "max_seq_len": 32}
MOE = LLAMA | {
    "family": "moe", "num_layers": 2, "moe": {"num_experts": 4, "top_k": 2, "num_dense_layers": 1, "z_weight": 0.001},
}
WIDE = LLAMA | {"d_model": 512, "num_layers": 1, "d_ff": 512}
"""Matrices of more than 1e5 elements, below which DeepSpeed's ZeRO-3 keeps parameters whole."""


def case(name: str, ranks: int, model: dict = LLAMA, dtype: str = "fp32", train: dict | None = None,
         **parallel) -> LayoutCase:
    """A layout with 8 rows a step."""
    return LayoutCase(name, ranks, model, 8, 32, {"zero_stage": 1} | parallel, train or {}, dtype)


CASES = by_name([
    case("tp2", 2, tp=2),
    case("tp2 bf16", 2, tp=2, dtype="bf16"),
    case("tp2 without sequence shards", 2, tp=2, sequence_parallel=False),
    case("tp2, gpt2", 2, GPT2, tp=2),
    case("tp4, 2 kv heads", 4, tp=4),
    case("cp2 ring", 2, cp=2),
    case("cp2 ring bf16", 2, cp=2, dtype="bf16"),
    case("cp2 ulysses", 2, cp=2, context_attention="ulysses"),
    case("pp2 1f1b, tied", 2, GPT2, pp=2),
    case("pp2 interleaved", 2, pp=2, schedule="interleaved_1f1b"),
    case("pp2 zero_bubble_v", 2, pp=2, schedule="zero_bubble_v"),
    case("dp2 zero0", 2, zero_stage=0),
    case("dp2 zero1", 2),
    case("dp2 zero1 bf16", 2, dtype="bf16"),
    case("dp2 zero2", 2, zero_stage=2),
    case("dp2 zero2 bf16", 2, zero_stage=2, dtype="bf16"),
    case("dp2 zero3", 2, WIDE, zero_stage=3),
    case("dp2 zero3 bf16", 2, WIDE, zero_stage=3, dtype="bf16"),
    case("tp2 dp2 zero1", 4, tp=2),
    case("tp2 dp2 zero2", 4, tp=2, zero_stage=2),
    case("tp2 pp2, tied", 4, GPT2, tp=2, pp=2),
    case("tp2 cp2 ring", 4, tp=2, cp=2),
    case("ep2", 2, MOE, ep=2),
    case("ep2 zero0", 2, MOE, ep=2, zero_stage=0),
    case("ep2 dp4 bf16", 4, MOE, ep=2, dtype="bf16"),
    case("ep2 tp2", 4, MOE, ep=2, tp=2),
    case("ep2 tp2 without sequence shards", 4, MOE, ep=2, tp=2, sequence_parallel=False),
    case("ep2 cp2", 4, MOE, ep=2, cp=2),
])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    names = parser.parse_args().cases
    print(describe_machine(["torch", "deepspeed"]))
    print("Bytes that rank 0 sends in a step of 8 rows of 32 tokens; all ranks were compared.\n")
    for ranks in sorted({CASES[name].ranks for name in names}):
        own = [name for name in names if CASES[name].ranks == ranks]
        run_local([json.dumps({"cases": own, "prints": "table"})], ranks, "bench.comm_rank")


if __name__ == "__main__":
    main()
