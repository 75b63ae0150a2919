"""The bridge to lm-evaluation-harness: `python -m megascale.train.harness REQUEST`; the request is JSON.

What the harness asks of a model is in `HarnessModel`, which needs none of it; where the package is installed a class
of its own kind hands its questions on.
Source of the interface: lm-evaluation-harness, docs/model_guide.md.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.run_file import peek_run_store, read_run_file
from megascale.config.load import parse_config
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import ConfigError
from megascale.model.generate import Sampling, draw_rows, open_rows
from megascale.model.transformer import Transformer
from megascale.train.generate import check_weights, load_model
from megascale.train.request import serve_request
from megascale.train.run_folder import TOKENIZER_FILE

NEW_TOKENS = 256
"""Longest answer where a task sets no limit, as the harness has it."""


class Request(Protocol):
    """One question of the harness; what `args` holds depends on its kind."""

    args: tuple


class HarnessModel:
    """Answers the three kinds of questions of the harness with a decoder.

    Args:
        end: id of the token that ends a text; it stands before a text without context.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, end: int):
        self.model, self.tokenizer, self.end = model, tokenizer, end

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-probability of the continuation, and whether greedy gives it."""
        return [self._score(*self._split(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Of each (text,): its log-probability, every token scored once, in windows of max_seq_len tokens."""
        return [self._score_whole(self._ids(request.args[0])) for request in requests]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Of each (context, settings): the continuation up to the first of the settings' `until`, without it."""
        return [self._continue(*request.args) for request in requests]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as tokens; blanks between them go with the continuation, as in a text they make a token with it."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        before = self._ids(context)
        return before or [self.end], self._ids(context + continuation)[len(before):]

    def _score_whole(self, tokens: list[int]) -> float:
        size, total = self.model.config.max_seq_len, 0.0
        for first in range(0, len(tokens), size):
            total += self._score(tokens[first - 1 : first] or [self.end], tokens[first : first + size])[0]
        return total

    @torch.no_grad()
    def _score(self, before: list[int], tokens: list[int]) -> tuple[float, bool]:
        """The log-probability of tokens; where all don't fit, the model sees the last that do."""
        size = self.model.config.max_seq_len
        if len(tokens) > size:
            raise ConfigError(f"a continuation of {len(tokens)} tokens is longer than model.max_seq_len = {size}")
        inputs_T = torch.tensor([*before, *tokens][:-1][-size:], device=self.model.device)
        logits_NV = self.model(inputs_T[None])[0, len(inputs_T) - len(tokens) :].float()
        labels_N1 = torch.tensor(tokens, device=self.model.device)[:, None]
        nll = logits_NV.log_softmax(dim=-1).gather(1, labels_N1).double().sum()
        return nll.item(), bool((logits_NV.argmax(dim=-1, keepdim=True) == labels_N1).all())

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        limit = settings.get("max_gen_toks", NEW_TOKENS)
        temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
        room = max(1, self.model.config.max_seq_len - limit)
        prompt = (self._ids(context) or [self.end])[-room:]
        text, drawn = "", []
        follow = open_rows(self.model, [prompt], limit, use_cache=True)
        for (token,) in draw_rows(follow, [prompt], limit, Sampling(temperature=temperature), self.end):
            if token == self.end:
                break
            drawn.append(token)
            text = self.tokenizer.decode(drawn)
            if any(stop in text for stop in until):
                break
        return text[: min([len(text), *(text.index(stop) for stop in until if stop in text)])]


def as_harness_class(base: type) -> type:
    """A class of the harness's own kind that hands questions on.

    Args:
        base: `lm_eval.api.model.LM`.
    """

    class Adapter(base):
        """See `HarnessModel`."""

        def __init__(self, answers: HarnessModel):
            super().__init__()
            self.answers = answers

        def loglikelihood(self, requests, **_) -> list[tuple[float, bool]]:
            return self.answers.loglikelihood(requests)

        def loglikelihood_rolling(self, requests, **_) -> list[float]:
            return self.answers.loglikelihood_rolling(requests)

        def generate_until(self, requests, **_) -> list[str]:
            return self.answers.generate_until(requests)

    return Adapter


def open_answers(run_folder: Path, step: int | None, kind: str) -> HarnessModel:
    """The answers of a run's checkpoint.

    Raises:
        CheckpointError, DataError: no whole checkpoint, or no tokenizer.
        ConfigError: a model that doesn't continue texts.
    """
    checkpoint = peek_checkpoint(peek_run_store(run_folder), step)
    config = parse_config(checkpoint.index.run.config, source=str(checkpoint.path))
    if not config.model.traits.is_causal or config.model.traits.has_decoder:
        raise ConfigError(f"--tasks: the harness asks for next tokens of a text, which a {config.model.family} model"
                          " doesn't give; leave --tasks out")
    check_weights(checkpoint, kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(checkpoint, config, kind=kind).to(device)
    return HarnessModel(model, load_tokenizer(run_folder / TOKENIZER_FILE), read_run_file(run_folder).eos_id)


def check_tasks(names: list[str], known: list[str]) -> None:
    """Refuses tasks that are neither the harness's nor a YAML file of one's own. Raises ConfigError."""
    for name in names:
        if name not in known and not (name.endswith(".yaml") and Path(name).is_file()):
            close = get_close_matches(name, known, 1)
            raise ConfigError(f"--tasks {name}: lm-evaluation-harness has no such task, and there is no such YAML file"
                              + (f"; did you mean {close[0]}?" if close else "; lm-eval ls tasks lists them"))


def serve(values: dict) -> None:
    """Has the harness evaluate, and prints its tables."""
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install lm-eval")
    answers = open_answers(Path(values["run_folder"]), values["step"], "ema" if values["ema"] else "master")
    from lm_eval import simple_evaluate  # a package that only this needs, and slow to import
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    tasks = TaskManager()
    check_tasks(values["tasks"], tasks.all_tasks)
    found = simple_evaluate(
        model=as_harness_class(LM)(answers), tasks=values["tasks"], limit=values["limit"], task_manager=tasks
    )
    print(make_table(found))


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
