"""The config on its way out: resolved YAML, its fingerprint, and the JSON schema that editors use."""

import hashlib
import json
from typing import Any

import yaml

from megascale.config.resume_rules import keeps_maths
from megascale.config.schema import RunConfig


def resolved_values(config: RunConfig) -> dict[str, Any]:
    """The config as plain nested values, with defaults that depend on other fields filled in."""
    values = config.model_dump(mode="json")
    model = config.model
    values["model"] |= {"num_kv_heads": model.kv_heads, "d_ff": model.ffn_dim, "tie_embeddings": model.is_tied,
                        "bias": model.has_bias}
    values["model"]["activation"] = model.feed_forward
    if model.is_rotary:
        values["model"]["rope_theta"] = model.rotary_base
    if model.traits.has_decoder:
        values["model"]["num_decoder_layers"] = model.decoder_layers
    has_horizon = config.optimizer.schedule != "constant"
    values["optimizer"]["horizon_steps"] = (
        config.optimizer.horizon_steps or config.train.max_steps if has_horizon else None
    )
    return values


def flat_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys."""
    flat = {}
    for key, value in values.items():
        flat |= flat_values(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def config_fingerprint(values: dict[str, Any]) -> str:
    """SHA-256 over the resolved values that decide what a run computes."""
    decisive = {key: value for key, value in flat_values(values).items() if not keeps_maths(key)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def to_yaml(values: dict[str, Any]) -> str:
    """Resolved values as YAML that `load_config` reads back."""
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=False)


def json_schema() -> str:
    """JSON schema of the config file, for completion and checks in editors."""
    schema = RunConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)  # a file with a base need not say everything; the loader checks the whole
    schema["properties"]["base"] = {"type": "string", "description": "Parent config file, relative to this one."}
    return json.dumps(schema, indent=2) + "\n"
