"""What a `config.json` says of rotary attention, as fields of our `model` section. Pure, no torch.

Read are the width of heads, how positions are stretched, and, of Qwen3, normalised queries and keys and which blocks
have a window.
"""

from collections.abc import Iterable
from typing import Any

from megascale.config.model import ModelConfig

PLAIN_ROPE = ("default", None)
ROPE_THETA = 10000.0
QWEN3_DEFAULTS = {
    "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": 128,
    "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28,
}
_STRETCHES = {
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"},
}
"""Their `rope_type` -> our field -> theirs."""
_YARN_LEGAL = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""Fields of yarn that our scaling has no place for, with the value that it computes."""


def rope_of(hf: dict[str, Any]) -> dict[str, Any]:
    """Newer files say `rope_parameters`; older ones `rope_theta` and, where it is special, `rope_scaling`."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def rotary_section(known: dict[str, Any], window: int | None) -> dict[str, Any]:
    """The fields beside shape and norms; `known` has the defaults of the class, `window` what it says of windows."""
    width = known.get("head_dim")
    theta = rope_of(known).get("rope_theta", known.get("rope_theta", ROPE_THETA))
    is_qwen = known["model_type"] == "qwen3"
    windows = qwen3_windows(known) if is_qwen else (window, None)
    return {
        "rope_theta": float(theta), "rope_scaling": scaling_section(known), "qk_norm": is_qwen,
        "head_width": None if width is None or width * known["num_attention_heads"] == known["hidden_size"] else width,
        "window": windows[0], "global_every": windows[1],
    }


def section_of_rotary(model: ModelConfig) -> dict[str, Any]:
    """The same fields of a model."""
    scaling, width = model.rope_scaling, model.head_dim
    return {
        "rope_theta": model.rotary_base, "qk_norm": model.qk_norm, "window": model.window,
        "head_width": None if width * model.num_heads == model.d_model else width, "global_every": model.global_every,
        "rope_scaling": None if scaling is None else {
            key: getattr(scaling, key) for key in ("kind", "original_seq_len", *_STRETCHES[scaling.kind])},
    }


def scaling_section(known: dict[str, Any]) -> dict[str, Any] | None:
    """`model.rope_scaling`, None for plain positions."""
    rope = rope_of(known)
    kind = rope.get("rope_type", rope.get("type"))
    if kind in PLAIN_ROPE:
        return None
    before = rope.get("original_max_position_embeddings") or known["max_position_embeddings"]
    found = {ours: rope[theirs] for ours, theirs in _STRETCHES[kind].items() if rope.get(theirs) is not None}
    missing = {"beta_fast": 32.0, "beta_slow": 1.0} if kind == "yarn" else {}
    return {"kind": kind, "original_seq_len": before} | missing | {key: float(value) for key, value in found.items()}


def rope_problems(known: dict[str, Any]) -> Iterable[str]:
    """What of the positions our model doesn't compute."""
    rope = rope_of(known)
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in (*PLAIN_ROPE, *_STRETCHES) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"rope_scaling = {rope}: only plain positions and {', '.join(_STRETCHES)} are supported"
        return
    needed = () if kind in PLAIN_ROPE else ("factor",) if kind != "llama3" else _STRETCHES["llama3"].values()
    if missing := [name for name in needed if rope.get(name) is None]:
        yield f"rope_scaling = {rope}: lacks {', '.join(missing)}, which {kind} must say"
    if kind == "yarn":
        for name, legal in _YARN_LEGAL.items():
            if rope.get(name, legal) != legal:
                yield f"rope_scaling.{name} = {rope[name]!r}: only {legal!r} is supported"


def qwen3_windows(known: dict[str, Any]) -> tuple[int | None, int | None]:
    """(window, global_every) of a Qwen3; its blocks were found regular by `qwen3_problems`."""
    kinds = qwen3_kinds(known)
    if "sliding_attention" not in kinds:
        return None, None
    return known["sliding_window"], kinds.index("full_attention") + 1 if "full_attention" in kinds else None


def qwen3_kinds(known: dict[str, Any]) -> list[str]:
    """What each block sees: as listed, or by the rule of the class, the last blocks a window if any does."""
    num_layers = known["num_hidden_layers"]
    has_window = known["use_sliding_window"] and known["sliding_window"] is not None
    if known.get("layer_types"):
        return [kind if has_window else "full_attention" for kind in known["layer_types"]]
    first = known["max_window_layers"] if has_window else num_layers
    return ["sliding_attention" if index >= first else "full_attention" for index in range(num_layers)]


def qwen3_problems(known: dict[str, Any]) -> Iterable[str]:
    """Windows in an order that `model.global_every` can't say."""
    kinds = qwen3_kinds(known)
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    regular = ["sliding_attention" if number % every else "full_attention" for number in range(1, len(kinds) + 1)]
    if kinds != regular:
        yield f"layer_types = {kinds}: blocks that see everything must be each n-th one, or all, or none"
