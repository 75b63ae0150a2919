"""Text from a run: `python -m megascale.train.generate REQUEST` prints it as it comes; the request is JSON.

The weights come from the newest whole checkpoint, in whatever layout it was written, into one plain model.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megascale.checkpoint.find import VerifiedCheckpoint, peek_checkpoint
from megascale.checkpoint.load import read_tensors
from megascale.config.load import parse_config
from megascale.errors import DataError, MegascaleError
from megascale.model.generate import Sampling, generate
from megascale.model.transformer import Transformer, build_model
from megascale.train.run_folder import TOKENIZER_FILE

END_OF_TEXT = "<|endoftext|>"


def load_model(checkpoint: VerifiedCheckpoint) -> Transformer:
    """The checkpoint's model in fp32, ready to use."""
    config = parse_config(checkpoint.index.run.config, source=str(checkpoint.path))
    model = build_model(config.model, config.run.seed)
    with torch.no_grad():
        for name, weight in read_tensors(checkpoint, "master/").items():
            model.get_parameter(name).copy_(weight)
    return model.eval()


def print_continuation(run_folder: Path, prompt: str, max_tokens: int, sampling: Sampling) -> None:
    """Prints the prompt and its continuation, token by token, to standard output.

    Raises:
        CheckpointError, DataError: no whole checkpoint, or no tokenizer to read and write text with.
    """
    model = load_model(peek_checkpoint(run_folder))
    tokenizer = load_tokenizer(run_folder / TOKENIZER_FILE)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = tokenizer.encode(prompt).ids or [end]
    print(prompt, end="", flush=True)
    shown, drawn = "", []
    for (token,) in generate(model, [tokens], max_tokens, sampling, eos_token=end):
        if token is None or token == end:
            break
        drawn.append(token)
        text = tokenizer.decode(drawn)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest of its bytes
            print(text[len(shown):], end="", flush=True)
            shown = text
    print()


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer so that text can never become a special token.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise DataError(f"{path}: can't be read as a tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def main(request: str) -> int:
    """Runs one request; a user's error is one message and an exit code."""
    values = json.loads(request)
    try:
        print_continuation(
            Path(values["run_folder"]), values["prompt"], values["max_tokens"], Sampling(**values["sampling"])
        )
    except MegascaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
