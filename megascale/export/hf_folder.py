"""Reading a Hugging Face model folder: `config.json`, safetensors files, `tokenizer.json`. Nothing in it is trusted."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megascale.checkpoint.files import read_bounded
from megascale.errors import ConfigError, DataError

HUB = "hf://"
CONFIG_NAME, TOKENIZER_NAME = "config.json", "tokenizer.json"
WEIGHTS_NAME, WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 1 << 20, 32 << 20
MAX_TOKENIZER_BYTES = 128 << 20
EXACT_DTYPES = ("F32", "BF16", "F16")
"""Element types whose every value is an fp32 value too."""
PREFIXES = {"gpt2": "transformer.", "llama": "model.", "bert": "bert.", "vit": "vit.", "t5": ""}
"""Before all names but the head's; models saved without their head, GPT-2 itself among them, leave it out."""
BUFFERS = re.compile(
    r".*\.attn\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq|.*\.position_ids"
    r"|(en|de)coder\.embed_tokens\.weight|.*\.EncDecAttention\.relative_attention_bias\.weight"
)
"""What old versions stored beside the weights: masks, wavelengths, and of T5 the shared table again and a bias that
nothing reads."""
HEAD = "lm_head.weight"
HEADS = (HEAD, "cls.", "classifier.")
OLD_NAMES = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
"""As the first BERTs were stored -> as they are now."""
NAMES_SHOWN = 5


class StoredTensor(NamedTuple):
    """Where a tensor is stored: its file, its name there, and what the header says."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class HfFolder:
    """A folder as `save_pretrained` leaves it.

    Attributes:
        folder: where it is.
        config: content of `config.json`.
        tensors: by their name in the model with its head.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text; empty where the config names none."""
        found = self.config.get("eos_token_id")
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    def tokenizer(self) -> bytes | None:
        """Content of `tokenizer.json`; None where there is none."""
        return _read_small(self.folder / TOKENIZER_NAME, MAX_TOKENIZER_BYTES)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type, of which only the pages that are looked at are read.

        Raises:
            DataError: its file is damaged, or a value isn't finite.
        """
        stored = self.tensors[name]
        with _open(self.folder / stored.file) as file:
            tensor = file.get_tensor(stored.name)
        if not torch.isfinite(tensor).all():
            raise DataError(f"{self.folder / stored.file}: {stored.name} has NaN or infinite values")
        return tensor

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses weights that aren't those of the model, from the headers alone.

        Args:
            expected: shape of each tensor by its name in the model with its head.

        Raises:
            DataError: missing, unexpected or misshapen tensors, or types that fp32 can't hold exactly.
        """
        found = self.tensors
        problems = [f"lacks {name} of shape {list(expected[name])}" for name in expected if name not in found]
        problems += [f"has {stored.name}, which this model doesn't have"
                     for name, stored in found.items() if name not in expected]
        for name, stored in found.items():
            if stored.shape != expected.get(name, stored.shape):
                problems.append(f"{stored.name} has shape {list(stored.shape)}, not {list(expected[name])}")
            if stored.dtype not in EXACT_DTYPES:
                problems.append(f"{stored.name} is {stored.dtype}; what can be read is {', '.join(EXACT_DTYPES)}")
        if problems:
            more = f"\n  and {len(problems) - NAMES_SHOWN} more" if len(problems) > NAMES_SHOWN else ""
            raise DataError(f"{self.folder}: not the weights of its {CONFIG_NAME}:\n  "
                            + "\n  ".join(problems[:NAMES_SHOWN]) + more)


def fetch_folder(url: str) -> Path:
    """The local copy of `hf://org/name` or `hf://org/name@revision`, downloaded where it isn't there yet.

    Raises:
        DataError: it can't be had.
    """
    from huggingface_hub import snapshot_download  # only where it is asked for

    name, _, revision = url.removeprefix(HUB).partition("@")
    wanted = [CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_INDEX_NAME, "model*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # of many classes: network, rights, names
        raise DataError(f"{url}: can't be downloaded: {str(error).splitlines()[0]}") from None


def open_folder(folder: Path) -> HfFolder:
    """Reads the config and the headers of the weights. Cost: one read of each header.

    Raises:
        ConfigError, DataError: a file is missing or isn't what its name says.
    """
    config = _read_json(folder / CONFIG_NAME, MAX_CONFIG_BYTES)
    prefix = PREFIXES.get(config.get("model_type"), PREFIXES["llama"])
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        with _open(folder / file) as content:
            for name in content.keys():  # noqa: SIM118 - not a mapping
                if BUFFERS.fullmatch(name):
                    continue
                part = content.get_slice(name)
                full_name = name if name.startswith((*HEADS, prefix)) else prefix + name
                for old, new in OLD_NAMES.items():
                    full_name = full_name.replace(old, new)
                if full_name in tensors:
                    raise DataError(f"{folder}: {name} is in {file} and in {tensors[full_name].file}")
                tensors[full_name] = StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
    return HfFolder(folder, config, tensors)


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS_INDEX_NAME).exists():
        files = _read_json(folder / WEIGHTS_INDEX_NAME, MAX_INDEX_BYTES).get("weight_map")
        names = list(files.values()) if isinstance(files, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise DataError(f"{folder / WEIGHTS_INDEX_NAME}: its weight_map doesn't name files of this folder")
        return sorted(set(names))
    if (folder / WEIGHTS_NAME).exists():
        return [WEIGHTS_NAME]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise DataError(
            f"{folder}: has its weights as {pickles[0]}, a pickle, which can run code when it is read; convert it where"
            " you trust it, with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise DataError(f"{folder}: has neither {WEIGHTS_NAME} nor {WEIGHTS_INDEX_NAME}")


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: can't be read as safetensors: {error}") from None


def _read_small(path: Path, limit_bytes: int) -> bytes | None:
    return read_bounded(path.resolve(), limit_bytes)  # the hub's cache is made of links


def _read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    text = _read_small(path, limit_bytes)
    if text is None:
        raise ConfigError(f"{path}: missing, not a regular file, or over {limit_bytes} bytes")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value
