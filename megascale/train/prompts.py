"""Prompts from a file."""

import json
from pathlib import Path

from megascale.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; in a file of the ending .jsonl, lines are JSON: a text, or {"prompt": text}.

    Raises:
        ConfigError: the file can't be read, has no prompt, or a line isn't one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {path}: can't be read: {error}") from None
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line]
    else:
        prompts = [_parse_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts-file {path}: holds no prompt; write one a line")
    return prompts


def _parse_prompt(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: is no JSON: {error}") from None
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ConfigError(f'{place}: is neither a text nor {{"prompt": text}}')
    return text
