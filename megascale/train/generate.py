"""Text from a run: `python -m megascale.train.generate REQUEST` prints it as it comes; the request is JSON.

The weights come from the newest whole checkpoint, in whatever layout it was written, into one plain model.
"""

import json
import sys
from pathlib import Path

import torch

from megascale.checkpoint.find import VerifiedCheckpoint, peek_checkpoint
from megascale.checkpoint.load import read_tensors
from megascale.config.load import parse_config
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import CheckpointError, MegascaleError
from megascale.model.generate import Sampling, generate
from megascale.model.transformer import Transformer, build_model
from megascale.train.run_folder import RUN_FILE, TOKENIZER_FILE, read_run_file


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
    run_file = read_run_file(run_folder)
    if run_file is None:
        raise CheckpointError(f"{run_folder / RUN_FILE} is missing; it names the token that ends a text")
    end = run_file.eos_id
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
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
