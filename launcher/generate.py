"""`megascale generate`: text from a run, made in a process of its own, so that the launcher needs no torch."""

import json
from pathlib import Path

from launcher.local import check_num_ranks, run_local
from launcher.request import run_request

GENERATE_MODULE = "megascale.train.generate"


def generate_text(
    run_folder: Path, prompt: str, max_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    seed: int, *, tp: int = 1, pp: int = 1, capture: bool = False,
) -> str:
    """Continues a text with the newest whole checkpoint of a run; prints it, or returns it when `capture` is set.

    With `tp` x `pp` over 1 so many ranks of this machine share the model, and print; they can't capture.

    Raises:
        ConfigError: a sampling setting that means nothing.
        RankFailedError: the generating process failed, for the reason in its message.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    request = {"run_folder": str(run_folder), "prompt": prompt, "max_tokens": max_tokens, "sampling": sampling,
               "layout": {"tp": tp, "pp": pp}}
    if tp * pp > 1:
        check_num_ranks(tp * pp)
        run_local([json.dumps(request)], tp * pp, GENERATE_MODULE)
        return ""
    return run_request(GENERATE_MODULE, request, capture=capture)
