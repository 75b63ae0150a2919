"""`megascale generate`: text from a run, made in a process of its own, so that the launcher needs no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.local import check_num_ranks, run_local
from launcher.request import run_request
from megascale.errors import ConfigError

GENERATE_MODULE = "megascale.train.generate"


@dataclass(frozen=True)
class Drawing:
    """How texts are made.

    Attributes:
        max_tokens: longest continuation, in tokens.
        temperature, top_k, top_p, seed: see `megascale.model.generate.Sampling`.
        num_samples: texts for each prompt.
        num_beams: continuations that a search keeps open; 1 draws tokens instead.
        num_best, length_penalty: see `megascale.model.beam.BeamSettings`.
        use_cache: whether keys and values are kept.
        dtype: that the model computes in.
    """

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    num_samples: int = 1
    num_beams: int = 1
    num_best: int = 1
    length_penalty: float = 1.0
    use_cache: bool = True
    dtype: str = "fp32"

    def request(self) -> dict[str, Any]:
        """As the generating process reads it.

        Raises:
            ConfigError: samples of a search, which draws nothing.
        """
        if self.num_beams > 1 and self.num_samples > 1:
            raise ConfigError(f"--samples {self.num_samples} with --beams {self.num_beams}: a search draws nothing, all"
                              " samples would be the same; use --best for several texts of one search")
        if self.num_best > self.num_beams:
            raise ConfigError(f"--best {self.num_best} is more than --beams {self.num_beams}; keep as many beams open")
        values = asdict(self)
        sampling = {name: values.pop(name) for name in ("temperature", "top_k", "top_p", "seed")}
        beam = {name: values.pop(name) for name in ("num_beams", "num_best", "length_penalty")}
        return values | {"sampling": sampling, "beam": beam if self.num_beams > 1 else None}


def generate_text(
    run_folder: Path, prompts: list[str] | Path, drawing: Drawing, *, step: int | None = None, tp: int = 1, pp: int = 1,
    as_json: bool = False, capture: bool = False, ema: bool = False,
) -> str:
    """Continues texts with a checkpoint of a run, the newest whole one by default; prints, or returns with `capture`.

    Args:
        prompts: the texts, or a file of them.
        ema: whether the averaged weights are taken.

    With `tp` x `pp` over 1 so many ranks of this machine share the model, and print; they can't capture.

    Raises:
        ConfigError: a setting that means nothing.
        RankFailedError: the generating process failed, for the reason in its message.
    """
    request = drawing.request() | {
        "run_folder": str(run_folder), "step": step, "layout": {"tp": tp, "pp": pp}, "ema": ema,
        "as_json": as_json, "prompts": str(prompts) if isinstance(prompts, Path) else prompts,
    }
    if tp * pp > 1:
        check_num_ranks(tp * pp)
        run_local([json.dumps(request)], tp * pp, GENERATE_MODULE)
        return ""
    return run_request(GENERATE_MODULE, request, capture=capture)
