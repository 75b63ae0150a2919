"""Tokens a second of generation with a cache and without: `python -m bench.generate [MAX_TOKENS]`.

Both take turns in one process, so that what else the machine does hits them alike; the ratio is of the medians. The
weights are random: only shapes decide how long a step takes.
"""

import statistics
import sys
import time

import torch

from megascale.config.model import ModelConfig
from megascale.model.generate import Sampling, generate
from megascale.model.transformer import Transformer, build_model

CONFIG = ModelConfig(
    family="llama", num_layers=6, d_model=256, num_heads=8, num_kv_heads=4, vocab_size=4096, max_seq_len=512
)
NUM_ROWS = 4
PROMPT_TOKENS = 64
NUM_TURNS = 3


def tokens_per_s(model: Transformer, max_tokens: int, *, use_cache: bool) -> float:
    """New tokens of all rows over the time that they took, prompts included."""
    prompts = [[1 + row] * PROMPT_TOKENS for row in range(NUM_ROWS)]
    started_s = time.perf_counter()
    num_steps = sum(1 for _ in generate(model, prompts, max_tokens, Sampling(temperature=0), use_cache=use_cache))
    return NUM_ROWS * num_steps / (time.perf_counter() - started_s)


def main(max_tokens: int) -> None:
    """Prints tokens a second both ways, and their ratio."""
    model = build_model(CONFIG, seed=0).eval()
    tokens_per_s(model, 2, use_cache=True)
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(NUM_TURNS):
        for use_cache, found in rates.items():
            found.append(tokens_per_s(model, max_tokens, use_cache=use_cache))
    cached, plain = statistics.median(rates[True]), statistics.median(rates[False])
    print(f"{NUM_ROWS} rows, {PROMPT_TOKENS} + {max_tokens} tokens, {torch.get_num_threads()} threads:"
          f" {cached:.1f} tokens/s with a cache, {plain:.1f} without, ratio {cached / plain:.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
