"""A vision transformer's config as that of ViTForImageClassification, and back. Pure."""

import json
from typing import Any

from megascale.config.model import ModelConfig
from megascale.config.objective import ObjectiveConfig
from megascale.config.vision import VisionConfig
from megascale.errors import ConfigError, DataError

BICUBIC = 3
"""Pillow's number of the resampling."""
VIT_FIELDS = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size", "norm_eps": "layer_norm_eps",
}
VIT_DEFAULTS = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
}
VIT_LEGAL = {"hidden_act": ("gelu",), "qkv_bias": (True,)}


def vit_architecture(config: ModelConfig) -> str:
    """The class of transformers that computes what this model computes.

    Raises:
        ConfigError: there is none; the message names the setting.
    """
    if config.vision.is_mae:
        raise ConfigError(
            f"model.vision.mae_decoder_layers = {config.vision.mae_decoder_layers} can't be exported: only classifiers"
            " are, as ViTForImageClassification"
        )
    if not config.vision.has_cls or config.feed_forward != "gelu" or not config.has_bias:
        raise ConfigError(
            f"model.vision.pooling = {config.vision.pooling}, model.activation = {config.feed_forward}, model.bias ="
            f" {config.has_bias} can't be exported: ViTForImageClassification has a class token, gelu and biases"
        )
    return "ViTForImageClassification"


def vit_fields(config: ModelConfig) -> dict[str, Any]:
    """The values of `config.json` that a vit has of its own; classes have their numbers as names."""
    vision = config.vision
    names = {str(number): str(number) for number in range(config.vocab_size)}
    return {
        "model_type": "vit", "hidden_act": "gelu", "qkv_bias": True, "image_size": vision.image_size,
        "patch_size": vision.patch_size, "num_channels": vision.channels, "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0, "id2label": names, "label2id": {n: int(n) for n in names},
        "hidden_size": config.d_model, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.norm_eps,
    }


def named_classes(content: bytes, place: str, config: ModelConfig) -> dict[str, Any]:
    """`id2label` and `label2id` with the names of a corpus's `classes.json`.

    Raises:
        DataError: it isn't one.
    """
    try:
        names = [str(name) for name in json.loads(content)["classes"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: holds no names of classes ({error}); copy it from the corpus of the run") from None
    names += [f"unused_{number}" for number in range(len(names), config.vocab_size)]
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def image_processor(vision: VisionConfig, objective: ObjectiveConfig) -> dict[str, Any]:
    """The values of `preprocessor_config.json`: resized to the model's size, without our cut to a square before it."""
    size = {"height": vision.image_size, "width": vision.image_size}
    mean, std = (list(values) * (vision.channels if len(values) == 1 else 1)
                 for values in (objective.pixel_mean, objective.pixel_std))
    return {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size, "resample": BICUBIC,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }


def vit_section(section: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Our `model` section from theirs.

    Args:
        section: the fields of VIT_FIELDS.
        known: `config.json` with their defaults.
    """
    vision = {"image_size": known["image_size"], "patch_size": known["patch_size"], "channels": known["num_channels"]}
    return section | {
        "vision": vision, "vocab_size": len(known.get("id2label") or ("0", "1")), "bias": True,
        "max_seq_len": (known["image_size"] // known["patch_size"]) ** 2, "tie_embeddings": False,
    }


def vision_of(model: ModelConfig) -> dict[str, Any]:
    """The fields of `vision` that decide what an imported model computes."""
    if model.vision.is_mae or not model.vision.has_cls:
        return {"vision": "with MAE or without a class token"}
    return {"vision": {key: getattr(model.vision, key) for key in ("image_size", "patch_size", "channels")}}
