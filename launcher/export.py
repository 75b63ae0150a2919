"""`megascale export`: a checkpoint for other tools, written by a process that has torch."""

import re
from pathlib import Path

from launcher.request import FRUGAL_ENVIRONMENT, run_request
from megascale.errors import ConfigError

EXPORT_MODULE = "megascale.export.hf_export"
ONNX_MODULE = "megascale.export.onnx_export"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""Powers of ten, as transformers' `max_shard_size` counts."""


def export_run(
    run_folder: Path, step: int | None, out: Path | None, dtype: str, max_shard_size: str, *, is_checked: bool,
    is_averaged: bool = False,
) -> None:
    """Writes a run's weights as a folder that transformers loads, and compares the logits of both sides.

    Raises:
        ConfigError: a size that means nothing.
        RankFailedError: the exporting process failed, for the reason in its message.
    """
    run_request(EXPORT_MODULE, {
        "run_folder": str(run_folder), "step": step, "out": str(out) if out else None, "dtype": dtype,
        "max_shard_bytes": parse_size(max_shard_size), "check": is_checked, "kind": "ema" if is_averaged else "master",
    }, FRUGAL_ENVIRONMENT)


def export_graph(
    run_folder: Path, step: int | None, out: Path | None, dtype: str, *, is_averaged: bool = False
) -> None:
    """Writes a run's decoder as an ONNX graph, and compares the logits of both sides.

    Raises:
        ConfigError: another precision than fp32.
        RankFailedError: the exporting process failed, for the reason in its message.
    """
    if dtype != "float32":
        raise ConfigError(f"--format onnx --dtype {dtype}: graphs are written in float32; leave --dtype out, and"
                          " convert the graph with onnxruntime's tools")
    run_request(ONNX_MODULE, {
        "run_folder": str(run_folder), "step": step, "out": str(out) if out else None,
        "kind": "ema" if is_averaged else "master",
    })


def parse_size(text: str) -> int:
    """The bytes of a size such as `5GB` or `500MB`.

    Raises:
        ConfigError: not such a size.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?(KB|MB|GB|TB)", text.strip().upper())
    size_bytes = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size_bytes <= 0:
        raise ConfigError(f"--max-shard-size {text}: write a number and {', '.join(UNITS)}, such as 5GB or 500MB")
    return size_bytes
