"""T5 against T5ForConditionalGeneration, the original transformer against torch's own layers: same weights, fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.export.hf_config import derive_hf_config
from megascale.export.hf_import import differences, model_section
from megascale.model.encoder_decoder import sinusoidal_positions
from megascale.model.families.hf_exchange import split_qkv
from megascale.model.families.hf_names import from_hf, to_hf
from megascale.model.families.hf_t5 import split_key_value
from megascale.model.flops import block_layers, forward_flops_per_token, layer_costs, num_parameters
from megascale.model.loss import linear_cross_entropy
from megascale.model.matrices import split_fused
from megascale.model.pair_context import build_pair_context
from megascale.model.relative_bias import relative_bucket
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.axis import ALONE

SHAPE = {"d_model": 32, "num_heads": 4, "vocab_size": 61, "max_seq_len": 64, "norm_eps": 1e-6, "init_std": 0.1}
T5_MODELS = {
    "v1.0": {"num_layers": 2, "head_width": 12, "d_ff": 48, "relative_buckets": 8, "relative_max_distance": 12},
    "v1.1": {
        "num_layers": 1, "num_decoder_layers": 3, "activation": "geglu", "tie_embeddings": False, "d_ff": 48,
        "relative_max_distance": 20,
    },
}
NUM_SOURCE, NUM_TARGET = 30, 20


def filled_model(config: ModelConfig) -> Transformer:
    """A model whose norms and biases aren't what they start as, since ones and zeros hide mistakes."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.shape[1] == config.num_heads:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def random_pair(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources padded to two lengths with their mask, inputs and labels of the decoder."""
    generator = torch.Generator().manual_seed(3)
    source_BS = torch.randint(0, config.vocab_size, (2, NUM_SOURCE), generator=generator)
    seen_BS = torch.arange(NUM_SOURCE) < torch.tensor([[NUM_SOURCE], [17]])
    target_BT = torch.randint(0, config.vocab_size, (2, NUM_TARGET + 1), generator=generator)
    labels_BT = target_BT[:, 1:].clone()
    labels_BT[1, 9:] = -100
    return source_BS, seen_BS, target_BT[:, :-1], labels_BT


def run_ours(model: Transformer, source_BS, seen_BS, target_BT, labels_BT):
    """Logits of real ids, and the mean loss."""
    context = build_pair_context(
        model.config, source_BS.shape[1], target_BT.shape[1], torch.device("cpu"),
        source_documents_BS=(~seen_BS).int(), documents_BT=torch.zeros_like(target_BT),
    )
    inputs_BU = torch.cat((source_BS, target_BT), dim=1)
    loss = model(inputs_BU, context, labels_BT) / (labels_BT >= 0).sum()
    return model(inputs_BU, context)[..., : model.config.vocab_size], loss


def hf_model(config: ModelConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.d_model, d_kv=config.head_dim, d_ff=config.ffn_dim,
        num_layers=config.num_layers, num_decoder_layers=config.decoder_layers, num_heads=config.num_heads,
        relative_attention_num_buckets=config.relative_buckets,
        relative_attention_max_distance=config.relative_max_distance, layer_norm_epsilon=config.norm_eps,
        feed_forward_proj="gated-gelu" if config.is_gated else "relu", tie_word_embeddings=config.is_tied,
        dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0,
    )).eval()
    if not config.is_tied:  # transformers 5 ties a head until it has loaded another one
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    return model


@pytest.mark.parametrize("version", T5_MODELS)
def test_logits_and_loss_equal_transformers(version):
    """Seen to catch: a tied head without its factor."""
    config = ModelConfig(family="t5", **SHAPE, **T5_MODELS[version])
    ours, theirs = filled_model(config), hf_model(config)
    tensors = dict(ours.named_parameters())
    converted = {name: tensor.detach() for name, tensor in to_hf(config, tensors).items()}
    report = theirs.load_state_dict(converted, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    if config.is_tied:
        theirs.tie_weights()
    back = from_hf(config, tensors, theirs.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    source_BS, seen_BS, target_BT, labels_BT = random_pair(config)
    with torch.no_grad():
        logits, loss = run_ours(ours, source_BS, seen_BS, target_BT, labels_BT)
        expected = theirs(
            input_ids=source_BS, attention_mask=seen_BS, decoder_input_ids=target_BT, labels=labels_BT
        )
    assert torch.allclose(logits, expected.logits, atol=1e-5), (logits - expected.logits).abs().max()
    assert abs(loss - expected.loss) < 1e-5


def test_fused_keys_and_values_are_matrices_of_their_own():
    """To Muon and to initial values. Seen to catch: the fused tensor taken as one."""
    config = ModelConfig(family="t5", **SHAPE, **T5_MODELS["v1.0"])
    name, fused = "decoder.blocks.0.cross_attention.key_value.weight", torch.randn(2 * config.heads_dim, config.d_model)
    parts = split_fused(name, fused, config)
    for part, expected in zip(parts, split_key_value(config, fused), strict=True):
        assert torch.equal(part.flatten(0, 2), expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_buckets_equal_transformers(is_causal):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    offset = torch.arange(-200, 201)
    expected = t5.T5Attention._relative_position_bucket(
        offset, bidirectional=not is_causal, num_buckets=32, max_distance=128
    )
    assert torch.equal(relative_bucket(offset, 32, 128, is_causal=is_causal), expected)


def torch_model(model: Transformer) -> nn.Transformer:
    """torch's post-norm transformer without norms behind its stacks, with the same weights."""
    config, biased = model.config, {"dropout": 0.0, "activation": "relu", "batch_first": True}
    sizes = config.d_model, config.num_heads, config.ffn_dim
    theirs = nn.Transformer(
        config.d_model, config.num_heads,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, **biased), config.num_layers, enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, **biased), config.decoder_layers),
        batch_first=True,
    ).eval()
    ours, values = dict(model.named_parameters()), {}
    names = {"attention_norm": "norm1", "attention.output": "self_attn.out_proj", "feed_forward.up": "linear1",
             "feed_forward.output": "linear2", "cross_norm": "norm2",
             "cross_attention.output": "multihead_attn.out_proj"}
    for stack, count in (("encoder", config.num_layers), ("decoder", config.decoder_layers)):
        last_norm = "norm2" if stack == "encoder" else "norm3"
        for block in range(count):
            mine, base = f"{stack}.blocks.{block}.", f"{stack}.layers.{block}."
            for kind in ("weight", "bias"):
                for ours_name, theirs_name in (names | {"feed_forward_norm": last_norm}).items():
                    if f"{mine}{ours_name}.{kind}" in ours:
                        values[f"{base}{theirs_name}.{kind}"] = ours[f"{mine}{ours_name}.{kind}"]
                fused = ours[f"{mine}attention.qkv.{kind}"]
                values[f"{base}self_attn.in_proj_{kind}"] = torch.cat(split_qkv(config, fused))
                if stack == "decoder":
                    query, both = (ours[f"{mine}cross_attention.{part}.{kind}"] for part in ("query", "key_value"))
                    values[f"{base}multihead_attn.in_proj_{kind}"] = torch.cat((query, *split_key_value(config, both)))
    assert values.keys() == theirs.state_dict().keys()
    theirs.load_state_dict({name: value.detach() for name, value in values.items()})
    return theirs


def test_the_original_transformer_equals_torch():
    """Seen to catch: sines without the embedding's factor."""
    config = ModelConfig(family="transformer", num_layers=2, num_decoder_layers=3, **SHAPE)
    ours = filled_model(config)
    theirs, table = torch_model(ours), ours.get_parameter("embedding.tokens.weight")
    source_BS, seen_BS, target_BT, labels_BT = random_pair(config)

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1])[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        sines = torch.zeros(tokens.shape[1], 32)
        sines[:, ::2], sines[:, 1::2] = positions.sin(), positions.cos()
        return F.embedding(tokens, table) * 32**0.5 + sines

    with torch.no_grad():
        logits, _ = run_ours(ours, source_BS, seen_BS, target_BT, labels_BT)
        hidden = theirs(
            embed(source_BS), embed(target_BT), src_key_padding_mask=~seen_BS, memory_key_padding_mask=~seen_BS,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(NUM_TARGET), tgt_is_causal=True,
        )
    expected = F.linear(hidden, table)[..., : config.vocab_size]
    assert torch.allclose(logits, expected, atol=1e-5), (logits - expected).abs().max()


def test_positions_count_from_the_start_of_each_document():
    documents_BT = torch.tensor([[0, 0, 0, 1, 1]])
    context = build_pair_context(
        ModelConfig(family="transformer", num_layers=1, **SHAPE), 5, 5, torch.device("cpu"),
        source_documents_BS=documents_BT, documents_BT=documents_BT,
    )
    assert context.source.position_ids_BT.tolist() == context.position_ids_BT.tolist() == [[0, 1, 2, 0, 1]]
    assert context.cross_mask.dense_B1TS[0, 0].tolist() == [[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 1]] * 2
    assert sinusoidal_positions(torch.tensor([[0]]), 4).tolist() == [[[0, 1, 0, 1]]]


@pytest.mark.parametrize("case", [*T5_MODELS, "transformer"])
def test_closed_forms(case):
    own = {"family": "transformer", "num_layers": 2} if case == "transformer" else {"family": "t5", **T5_MODELS[case]}
    config = ModelConfig(**SHAPE, **own)
    model = Transformer(config, build_model(config, 0).axes)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    costs = layer_costs(config, 32, 8)
    assert len(costs) == len(model.specs)
    assert block_layers(config) == {index for index, spec in enumerate(model.specs) if "blocks." in spec.name}
    weights = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    on_target = sum(size for name, size in weights.items() if name.startswith("decoder.blocks") and "key_v" not in name)
    on_source = sum(size for name, size in weights.items() if name.startswith("encoder.blocks") or "key_v" in name)
    pairs = config.num_layers * 32 * 32 + config.decoder_layers * 8 * (8 + 32)
    products = 2 * (32 * on_source + 8 * (on_target + 64 * 32)) + 4 * config.heads_dim * pairs
    assert forward_flops_per_token(config, 32, 8) == products / 32


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_label_smoothing_equals_torch(softcap):
    """Seen to catch: the share spread over padded ids too; the label's own part of it left out of the gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(64, 16, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([1, 5, -100, 60, 0, 33, 8])
    gradients = []
    for is_ours in (True, False):
        logits = F.linear(hidden, weight)[:, :61]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = (
            linear_cross_entropy(hidden.float(), weight.float(), labels, 61, ALONE, softcap, label_smoothing=0.1)
            if is_ours else F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
        )
        gradients.append((loss.detach().double(), *torch.autograd.grad(loss, (hidden, weight))))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", T5_MODELS)
def test_the_config_of_an_export_is_read_back(version):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(family="t5", **SHAPE, **T5_MODELS[version])
    values = derive_hf_config(config, eos_id=5, dtype="float32")
    theirs = transformers.T5Config(**{key: value for key, value in values.items() if key != "architectures"})
    assert theirs.scale_decoder_outputs == config.is_tied
    assert theirs.decoder_start_token_id == 5
    assert differences(model_section(values, "here"), config, {}) == []
    assert differences(model_section(values | {"d_kv": 9}, "here"), config, {})
