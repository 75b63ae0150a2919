"""A right matrix product on each device of this node: integers small enough that every sum is exact.

A process of its own, `python -m megascale.train.node_check NUM_GPUS` (0 for the CPU), which the pre-flight starts.
Torch is imported for GPUs alone: on a CPU numpy multiplies, since importing torch takes longer than all other checks
together, and on a busy node longer than the pre-flight may.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np

from megascale.errors import EXIT_OK, EXIT_RUN
from megascale.train.signals import stop_when_parent_dies

SEED = 20261121
CPU_SIZE, GPU_SIZE = 512, 4096
"""Rows and columns of the matrices: a blink on one core, all multiprocessors of a GPU."""
INNER_BF16 = 256
"""Sums of 256 values of -1 and 1 are integers up to 256: exact in bf16, in whatever order they are added."""
CPU_REPEATS, GPU_REPEATS = 2, 20


def multiply(left, right):
    """The product that is checked, of two arrays or two tensors."""
    return left @ right


def draw_matrices(size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of integer-valued matrices, by the data type in which their product is exact."""
    generator = np.random.default_rng(SEED)
    wide = [generator.integers(-8, 9, (size, size)) for _ in range(2)]
    signs = [generator.integers(0, 2, shape) * 2 - 1 for shape in ((size, INNER_BF16), (INNER_BF16, size))]
    pairs = {"fp32": wide, "bf16": signs}
    return {kind: tuple(matrix.astype(np.float32) for matrix in pair) for kind, pair in pairs.items()}


def count_wrong_rows(left: np.ndarray, right: np.ndarray, product: np.ndarray) -> int:
    """Rows of a product of integer-valued matrices that are wrong, found in exact arithmetic on the CPU.

    Freivalds' check: product times a random vector against left times (right times the vector). A single wrong element
    is always found, several are missed by a chance of about 1 in 1,000 a row. Cost: one pass over each matrix.
    """
    left, right, product = (matrix.astype(np.float64) for matrix in (left, right, product))
    vector = np.random.default_rng(SEED + 1).integers(1, 1025, right.shape[1]).astype(np.float64)
    # doubles hold integers up to 2^53 exactly; the largest sum here is 4096 x 4096 x 64 x 1024 = 2^40
    return int((product @ vector != left @ (right @ vector)).sum())


def measure(left, right, num_repeats: int, is_same: Callable) -> tuple[object, int, float]:
    """Multiplies again and again; returns the first product, how many others differ from it, and TFLOP/s."""
    first = multiply(left, right)
    began_s = time.perf_counter()
    num_differing = sum(not is_same(multiply(left, right), first) for _ in range(num_repeats))
    took_s = time.perf_counter() - began_s  # comparing waits for the device
    return first, num_differing, 2 * left.shape[0] * left.shape[1] * right.shape[1] * num_repeats / took_s / 1e12


def check_cpu() -> dict:
    """Multiplies on one core; returns the device, the wrong rows by data type, and TFLOP/s."""
    left, right = draw_matrices(CPU_SIZE)["fp32"]
    product, num_differing, tflops = measure(left, right, CPU_REPEATS, np.array_equal)
    wrong = count_wrong_rows(left, right, product) + num_differing
    return {"device": "cpu", "wrong": {"fp32": wrong}, "tflops": round(tflops, 3)}


def check_tensors(device: str, size: int, num_repeats: int) -> dict:
    """The same as `check_cpu` with torch on one of its devices, in bf16 too."""
    import torch  # not at the top: see there

    wrong, speeds = {}, {}
    for kind, pair in draw_matrices(size).items():
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        left, right = (torch.from_numpy(matrix).to(device, dtype) for matrix in pair)
        product, num_differing, speeds[kind] = measure(left, right, num_repeats, torch.equal)
        wrong[kind] = count_wrong_rows(*pair, product.float().cpu().numpy()) + num_differing
    return {"device": device, "wrong": wrong, "tflops": round(speeds["fp32"], 3)}


def check_gpus(num_gpus: int) -> dict:
    """All GPUs in turn, and how many torch sees; what goes wrong on one is told as its `error`."""
    import torch

    devices, seen = [], torch.cuda.device_count()
    for index in range(min(seen, num_gpus)):
        try:
            result = check_tensors(f"cuda:{index}", GPU_SIZE, GPU_REPEATS)
            devices.append(result | {"name": torch.cuda.get_device_name(index)})
        except RuntimeError as error:  # torch's for all that goes wrong on a device
            devices.append({"device": f"cuda:{index}", "error": str(error).splitlines()[0]})
    return {"torch_gpus": seen, "devices": devices}


def main(num_gpus: int) -> None:
    """Prints one JSON object: `devices`, and for GPUs `torch_gpus`."""
    print(json.dumps(check_gpus(num_gpus) if num_gpus else {"devices": [check_cpu()]}), flush=True)


if __name__ == "__main__":
    stop_when_parent_dies()
    try:
        main(int(sys.argv[1]))
    except Exception as error:  # a driver that doesn't start has errors of all kinds
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_RUN)
    sys.exit(EXIT_OK)
