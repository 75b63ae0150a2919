"""Vision transformers: against transformers' own, and what their data and layouts ask of a config."""

from math import cos, sin

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.config.validate import check_config
from megascale.data.batch import Batch
from megascale.errors import ConfigError
from megascale.model.axes import ONE_RANK
from megascale.model.families.hf_names import from_hf, to_hf
from megascale.model.families.hf_vit import HF_SINES
from megascale.model.transformer import build_model
from megascale.train.image_objective import image_objective

ROWS = 3
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "image_size": 12, "patch_size": 4, "num_channels": 3, "layer_norm_eps": 1e-5}
MAE_SHAPE = SHAPE | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
                     "decoder_intermediate_size": 64, "mask_ratio": 0.6}


def run_config(vision: dict | None = None, **sections: dict) -> RunConfig:
    """A config of a tiny vit; 12 x 12 pixels in 9 patches."""
    vision = {"image_size": 12, "patch_size": 4} | (vision or {})
    values = {
        "run": {"name": "vit", "folder": "unused", "seed": 1},
        "model": {"family": "vit", "num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 64, "vocab_size": 7,
                  "max_seq_len": 9, "vision": vision},
        "data": {"folder": "unused", "packing": "none"},
        "train": {"seq_len": 9, "micro_batch_size": 2, "global_batch_tokens": 72, "max_steps": 10},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "precision": {"dtype": "fp32"},
        "evaluate": {"interval_steps": 1000},
        "checkpoint": {"interval_steps": 1000},
    }
    return parse_config({name: values.get(name, {}) | sections.get(name, {}) for name in values | sections}, "test")


FOUR_BY_FOUR = {"train": {"seq_len": 16, "global_batch_tokens": 128}, "model": {"max_seq_len": 16}}
"""Patches of 3 x 3 pixels."""
MAE = {"mae_decoder_layers": 2, "mae_decoder_width": 16, "mae_decoder_heads": 2}


def mae_config(**vision) -> RunConfig:
    objective = {"kind": "mae", "mask_fraction": 0.6}
    return run_config(MAE | vision, data={"folder": "unused", "packing": "none", "objective": objective})


def image_batch(labels_BT: torch.Tensor) -> Batch:
    images_BCHW = torch.randn(len(labels_BT), 3, 12, 12, generator=torch.Generator().manual_seed(4))
    nothing_BT = torch.zeros_like(labels_BT)
    return Batch(nothing_BT, labels_BT, nothing_BT.int(), torch.arange(len(labels_BT)), images_BCHW=images_BCHW)


def stored(model: torch.nn.Module, folder) -> dict[str, torch.Tensor]:
    """Their weights by the names in a file, which differ from those in memory; biases are drawn, so that they count."""
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def load_ours(config: RunConfig, tensors: dict[str, torch.Tensor]):
    model = build_model(config.model, 0)
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for name, value in from_hf(config.model, names, tensors).items():
            model.get_parameter(name).copy_(value)
    return model


def test_classes_are_those_of_transformers(tmp_path):
    """Logits and loss to 1e-5, and the same bits back."""
    theirs = ViTForImageClassification(ViTConfig(**SHAPE, num_labels=7)).eval()
    tensors, config = stored(theirs, tmp_path), run_config()
    ours, labels_BT = load_ours(config, tensors), torch.tensor([[2], [6], [0]])
    batch = image_batch(labels_BT)
    inputs, context, _ = image_objective(config, ONE_RANK)(batch, 0, None)
    with torch.no_grad():
        expected = theirs(batch.images_BCHW, labels=labels_BT[:, 0])
        logits_BV = ours(inputs, context)[:, 0, :7]
        loss = ours(inputs, context, labels_BT)
    torch.testing.assert_close(logits_BV, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss / ROWS, expected.loss, rtol=0, atol=1e-5)
    back = to_hf(config.model, dict(ours.named_parameters()))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    hidden, head = hidden_before_head(ours, inputs, context), ours.stages[0].head
    hits, labels = head.count_hits(hidden, context, labels_BT)
    assert (int(hits), int(labels)) == (int((expected.logits.argmax(1) == labels_BT[:, 0]).sum()), ROWS)
    places_B = (expected.logits > expected.logits.gather(1, labels_BT)).sum(dim=1)
    assert int(head.count_near(hidden, context, labels_BT)) == int((places_B < 5).sum())


def test_near_hits_are_labels_among_the_five_largest():
    """Each label has another place in the order. Seen to catch: the four or six largest; padded classes counted."""
    model = build_model(run_config().model, 0)
    batch = image_batch(torch.zeros(ROWS, 1, dtype=torch.int64))
    inputs, context, _ = image_objective(run_config(), ONE_RANK)(batch, 0, None)
    hidden = hidden_before_head(model, inputs, context)
    with torch.no_grad():
        order_BV = model(inputs, context)[:, 0, :7].argsort(dim=-1, descending=True)
    near = [int(model.stages[0].head.count_near(hidden, context, order_BV[:, [place]])) for place in range(7)]
    assert near == [ROWS] * 5 + [0] * 2
    assert int(model.stages[0].head.count_near(hidden, context, torch.full((ROWS, 1), -100))) == 0


def hidden_before_head(model, inputs, context):
    with torch.no_grad():
        for layer in model.layers[:-1]:
            inputs = layer(inputs, context)
    return inputs


@pytest.mark.parametrize("patch_norm", [True, False])
def test_masked_images_are_those_of_transformers(tmp_path, patch_norm):
    """The same visible patches give the same loss and predictions to 1e-5."""
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**MAE_SHAPE, norm_pix_loss=patch_norm)).eval()
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings[0, 1:] = plain_sines(3, 32)
        theirs.decoder.decoder_pos_embed[0, 1:] = plain_sines(3, 16)
    tensors, config = stored(theirs, tmp_path), mae_config(mae_patch_norm=patch_norm)
    ours = load_ours(config, tensors)
    noise_BT = torch.rand(ROWS, 9, generator=torch.Generator().manual_seed(6))
    is_hidden_BT = noise_BT.argsort(dim=1).argsort(dim=1) >= 3  # 9 x (1 - 0.6) = 3.6 are visible
    batch = image_batch(torch.where(is_hidden_BT, 0, -100))
    inputs, context, labels_BT = image_objective(config, ONE_RANK)(batch, 0, None)
    with torch.no_grad():
        expected = theirs(batch.images_BCHW, noise=noise_BT)
        predicted_BTP, loss = ours(inputs, context), ours(inputs, context, labels_BT)
    assert torch.equal(expected.mask.bool(), is_hidden_BT)
    torch.testing.assert_close(predicted_BTP, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss / is_hidden_BT.sum(), expected.loss, rtol=0, atol=1e-5)
    back = to_hf(config.model, dict(ours.named_parameters()))
    assert back.keys() == tensors.keys() - HF_SINES.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in back)


def plain_sines(side: int, width: int) -> torch.Tensor:
    """[sin of the column, cos of the column, sin of the row, cos of the row], number by number."""
    quarter = width // 4

    def waves(place: int) -> list[float]:
        angles = [place / 10000 ** (index / quarter) for index in range(quarter)]
        return [sin(angle) for angle in angles] + [cos(angle) for angle in angles]

    return torch.tensor([waves(column) + waves(row) for row in range(side) for column in range(side)])


def test_mean_of_patches_has_no_class_token():
    config = run_config({"pooling": "mean"})
    model = build_model(config.model, 0)
    names = dict(model.named_parameters())
    assert "embedding.cls" not in names
    assert names["embedding.positions.weight"].shape == (9, 32)
    inputs, context, _ = image_objective(config, ONE_RANK)(image_batch(torch.tensor([[1], [2]])), 0, None)
    hidden_BTD = hidden_before_head(model, inputs, context)
    head = model.stages[0].head
    with torch.no_grad():
        head.weight.normal_()
        torch.testing.assert_close(model(inputs, context)[:, 0, :7], hidden_BTD.mean(1) @ head.weight[:7].T)


@pytest.mark.parametrize(("sections", "vision", "ranks", "refused"), [
    ({"train": {"seq_len": 8, "global_batch_tokens": 64}}, {}, 1, "train.seq_len = 8"),
    ({"data": {"folder": "x", "packing": "concat"}}, {}, 1, "use packing: none"),
    ({"data": {"folder": "x", "packing": "none", "objective": {"kind": "mae"}}}, {}, 1, "use kind: classify"),
    ({}, MAE, 1, "use kind: mae"),
    ({"parallel": {"cp": 2}}, {}, 2, "parallel.cp = 2 with model.family = vit"),
    ({"parallel": {"tp": 2}} | FOUR_BY_FOUR, {"patch_size": 3}, 2, "17 positions, .* use sequence_parallel: false"),
    ({"data": {"folder": "x", "packing": "none", "objective": {"pixel_mean": [0.1, 0.2]}}}, {}, 1, "has 2 numbers"),
], ids=["seq_len", "packing", "mae_without_decoder", "classes_with_decoder", "cp", "sequence_parallel", "pixel_mean"])
def test_a_config_that_cant_work_is_refused_with_the_way_out(sections, vision, ranks, refused):
    with pytest.raises(ConfigError, match="(?s).*" + refused):
        check_config(run_config(vision, **sections), ranks, None)


def test_mae_takes_tp_without_sequence_shards_and_no_pipeline():
    parallel = {"tp": 2, "sequence_parallel": False}
    data = {"folder": "x", "packing": "none", "objective": {"kind": "mae"}}
    check_config(run_config(MAE, data=data, parallel=parallel), 2, None)
    for layout, refused in (({"tp": 2}, "visible patches"), ({"pp": 2}, "parallel.pp = 2 with MAE")):
        with pytest.raises(ConfigError, match=refused):
            check_config(run_config(MAE, data=data, parallel=layout), 2, None)
