"""`megascale generate`: text from a run, made in a process of its own, so that the launcher needs no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launcher.local import count_cores
from megascale.errors import RankFailedError


def generate_text(
    run_folder: Path, prompt: str, max_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    seed: int, *, capture: bool = False,
) -> str:
    """Continues a text with the newest whole checkpoint of a run; prints it, or returns it when `capture` is set.

    Raises:
        ConfigError: a sampling setting that means nothing.
        RankFailedError: the generating process failed, for the reason in its message.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    request = {"run_folder": str(run_folder), "prompt": prompt, "max_tokens": max_tokens, "sampling": sampling}
    finished = subprocess.run(
        [sys.executable, "-m", "megascale.train.generate", json.dumps(request)],
        env={"OMP_NUM_THREADS": str(count_cores())} | os.environ, stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False,
    )
    if finished.returncode:
        fault = RankFailedError(finished.stderr.strip().removeprefix("error: "))
        fault.exit_code = finished.returncode if finished.returncode > 0 else fault.exit_code
        raise fault
    return finished.stdout or ""
