"""BERT against transformers: logits, losses, exports and imports; and what its config refuses."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.config.model import ModelConfig
from megascale.errors import ConfigError
from megascale.export.check import check_logits
from megascale.export.hf_export import export_run
from megascale.export.hf_folder import open_folder
from megascale.export.hf_import import model_section, section_of
from megascale.export.weight_source import open_source
from megascale.model.attention_mask import AttentionMask
from megascale.model.context import build_context
from megascale.model.families.hf_names import to_hf
from megascale.model.flops import layer_costs
from megascale.model.ring import plan_tiles
from megascale.model.transformer import build_model, parameter_shapes
from tests.support.bert_rows import batch_of, build_test_masked
from tests.support.export_run import make_run, random_weights
from tests.support.layouts import LayoutCase, case_config

SHAPE = {"family": "bert", "num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 61, "max_seq_len": 32,
         "norm_eps": 1e-12}
CLASSES = {"pairs": BertForPreTraining, "tokens": BertForMaskedLM, "untied": BertForMaskedLM}
CONFIGS = {"pairs": SHAPE | {"pair_head": True}, "tokens": SHAPE | {"activation": "gelu_tanh", "num_segments": 3},
           "untied": SHAPE | {"tie_embeddings": False, "d_ff": 48, "norm_eps": 1e-3}}


def build_theirs(kind: str, config: ModelConfig, weights: dict[str, torch.Tensor]):
    """Their model with our weights."""
    activation = {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.feed_forward]
    model = CLASSES[kind](BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=config.ffn_dim,
        max_position_embeddings=32, type_vocab_size=config.num_segments, hidden_act=activation,
        layer_norm_eps=config.norm_eps,
        tie_word_embeddings=config.is_tied,
    )).eval()
    missing, unexpected = model.load_state_dict(to_hf(config, weights), strict=False)
    assert not unexpected
    tied = {"cls.predictions.decoder.bias", "cls.predictions.decoder.weight"} if config.is_tied else set()
    assert set(missing) <= tied
    model.tie_weights()
    return model


def build_ours(config: ModelConfig, weights: dict[str, torch.Tensor]):
    model = build_model(config, 1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


@pytest.mark.parametrize("kind", CLASSES)
def test_logits_and_loss_are_those_of_transformers(kind):
    """Seen to catch: the tanh form of GELU in the head's transform, segments left out, norms before the sum,
    the bias left out of the loss.
    """
    config = ModelConfig(**CONFIGS[kind])
    weights = random_weights(config)
    ours, theirs = build_ours(config, weights), build_theirs(kind, config, weights)
    run = case_config(LayoutCase("bert", 1, {}, "bert_pairs", data={"objective": {"pair_task": "sop"}}))
    batch = batch_of(build_test_masked(run), 61, 1, range(0, 12, 3))  # full rows: theirs have no documents
    context = build_context(config, 16, torch.device("cpu"), segments_BT=batch.segments_BT, pair_weight=2.5)
    labels_BT = torch.where(batch.labels_BT < 0, -100, batch.labels_BT)
    with torch.no_grad():
        logits = ours(batch.tokens_BT, context)[..., :61]
        loss = ours(batch.tokens_BT, context, batch.labels_BT)
        if kind != "pairs":
            expected = theirs(batch.tokens_BT, token_type_ids=batch.segments_BT, labels=labels_BT)
            total = expected.loss * (labels_BT >= 0).sum()
            torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
        else:
            classes_B = -1 - batch.labels_BT[:, 0]
            assert sorted(classes_B.unique().tolist()) == [0, 1]
            expected = theirs(batch.tokens_BT, token_type_ids=batch.segments_BT)
            pairs = torch.nn.functional.cross_entropy(expected.seq_relationship_logits, classes_B, reduction="sum")
            tokens = torch.nn.functional.cross_entropy(
                expected.prediction_logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")
            total = tokens + 2.5 * pairs
            torch.testing.assert_close(logits, expected.prediction_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=1e-5)


def test_gradients_of_the_fused_head_are_those_of_its_logits():
    """Seen to catch: the bias's gradient not multiplied by that of the loss."""
    config = ModelConfig(**CONFIGS["pairs"])
    fused = build_ours(config, random_weights(config)).double()
    plain = copy.deepcopy(fused)
    run = case_config(LayoutCase("bert", 1, {}, "bert"))
    batch = batch_of(build_test_masked(run), 61, 1, range(8))
    context = build_context(config, 16, torch.device("cpu"), documents_BT=batch.documents_BT)
    loss = 3.0 * fused(batch.tokens_BT, context, batch.labels_BT)
    loss.backward()
    logits_NV = plain(batch.tokens_BT, context).flatten(0, 1)
    (3.0 * torch.nn.functional.cross_entropy(logits_NV, batch.labels_BT.flatten(), reduction="sum")).backward()
    for (name, own), expected in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if not name.startswith("head.pairs"):
            torch.testing.assert_close(own.grad, expected.grad, rtol=1e-6, atol=1e-6, msg=name)
    hits, total = fused.stages[0].head.count_hits(hidden_of(fused, batch, context), context, batch.labels_BT)
    is_label_N = batch.labels_BT.flatten() >= 0
    assert int(total) == int(is_label_N.sum())
    assert int(hits) == int((logits_NV.argmax(dim=1) == batch.labels_BT.flatten())[is_label_N].sum())


def hidden_of(model, batch, context) -> torch.Tensor:
    """What the head gets."""
    hidden = batch.tokens_BT
    for layer in model.stages[0].layers:
        hidden = layer(hidden, context)
    return hidden


@pytest.mark.parametrize("source", [0, 1])
def test_a_ring_both_ways_sees_every_key_in_every_step(source):
    """Seen to catch: the tiles of causal order, which leave out what is behind."""
    mask = AttentionMask(torch.arange(8), None, None, None, None, is_causal=False)
    (tile,) = plan_tiles(0, source, 2, 8, mask)
    assert (tile.queries, tile.keys) == (slice(0, 8), slice(0, 8))
    assert tile.seen(mask) is None
    assert not tile.is_causal


def test_padding_changes_nothing():
    """Seen to catch: padding that isn't a document of its own."""
    run = case_config(LayoutCase("bert", 1, {}, "bert"))
    model, masked = build_ours(run.model, random_weights(run.model)), build_test_masked(run)
    batch = batch_of(masked, 61, 1, range(1, 2))
    size = int((batch.documents_BT == 0).sum())
    assert size < 16
    context = build_context(run.model, 16, torch.device("cpu"), documents_BT=batch.documents_BT)
    other = torch.where(batch.documents_BT == 0, batch.tokens_BT, 9)
    with torch.no_grad():
        expected = model(batch.tokens_BT[:, :size])
        for tokens_BT in (batch.tokens_BT, other):
            torch.testing.assert_close(model(tokens_BT, context)[:, :size], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_exported_and_imported_again(kind, tmp_path):
    """Seen to catch: the head's bias not padded, `layer_norm_eps` left out."""
    config = ModelConfig(**CONFIGS[kind])
    weights = make_run(tmp_path / "run", CONFIGS[kind])
    done = export_run(tmp_path / "run", None, tmp_path / "hf", "float32", 10**9)
    assert check_logits(tmp_path / "run", done.step, done.folder, "float32") < 1e-5
    theirs = CLASSES[kind].from_pretrained(done.folder)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (done.folder, tmp_path / "theirs"):
        source = open_source(str(folder))
        assert source.section == section_of(config)
        shapes = parameter_shapes(config)
        source.check(config, shapes)
        for name, shape in shapes.items():
            assert torch.equal(source.read(config, name, shape), weights[name]), name
    assert load_file(tmp_path / "hf/model.safetensors").keys() <= theirs.state_dict().keys()


def test_what_cannot_be_imported_is_named():
    hf = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "hidden_size": 32, "vocab_size": 61,
          "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32,
          "position_embedding_type": "relative_key"}
    with pytest.raises(ConfigError, match=r"(?s)position_embedding_type = 'relative_key'.*BertForQuestionAnswering"):
        model_section(hf, "config.json")


def test_names_of_the_first_berts_are_known(tmp_path):
    make_run(tmp_path / "run", CONFIGS["tokens"])
    done = export_run(tmp_path / "run", None, tmp_path / "hf", "float32", 10**9)
    path = done.folder / "model.safetensors"
    content = path.read_bytes().replace(b"LayerNorm.weight", b"LayerNorm.gamma ").replace(b'.gamma "', b'.gamma" ')
    path.write_bytes(content)
    assert open_folder(done.folder).tensors["bert.embeddings.LayerNorm.weight"].shape == (32,)


@pytest.mark.parametrize(("model", "data", "words"), [
    ({}, {"objective": {"pair_task": "nsp"}}, "set model.pair_head: true"),
    ({"pair_head": True}, {}, "set model.pair_head: false"),
    ({"pair_head": True}, {"objective": {"pair_task": "sop"}, "document_mask": True}, "document_mask: false"),
    ({"pair_head": True, "num_segments": 1}, {"objective": {"pair_task": "sop"}}, "use num_segments: 2"),
    ({}, {"packing": "bestfit", "folder": None,
          "corpora": {"code": {"folder": "x", "weight": 1.0, "fim_fraction": 0.5}}}, "set fim_fraction: 0"),
])
def test_config_is_refused(model, data, words):
    config = parse_config({
        "run": {"name": "bert", "folder": "unused"}, "model": SHAPE | model, "data": {"folder": "unused"} | data,
        "train": {"seq_len": 16, "micro_batch_size": 1, "global_batch_tokens": 16, "max_steps": 1},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0}, "evaluate": {"interval_steps": 1},
        "checkpoint": {"interval_steps": 1},
    }, source="test")
    with pytest.raises(ConfigError, match=words):
        derive(config, 1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_layer_has_a_cost(kind):
    config = ModelConfig(**CONFIGS[kind])
    assert len(layer_costs(config, 16)) == len(build_model(config, 1).specs)
