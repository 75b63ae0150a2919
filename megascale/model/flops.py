"""Parameters and floating-point operations of a model in closed form, without torch.

Legend: L num_layers, D d_model, H heads, K kv heads, C head_dim, F d_ff, V vocabulary rows, T positions.

Weights that multiply a token, per block:
    attention     D (H + 2K) C  for q, k, v,  plus  D D  for the output
    feed-forward  2 D F  for gpt2,  3 D F  for llama (gate, up, output)
and D V for the head. A multiplication and an addition are two operations, and the backward pass has twice the products
of the forward pass (one for the input's gradient, one for the weight's), so training takes 6 per weight and token.

Attention itself has no weights: q k and the mixing of v take 2 C operations each per head and pair of positions. A
query at position t sees t + 1 keys, (T + 1) / 2 on average, so that the exact count is 4 D (T + 1) / 2 per token and
block. The usual convention counts all T: 4 D T, and 12 L D T in training (Chowdhery et al. 2022, PaLM, appendix B). We
follow it, so that the utilisation (MFU) we report can be compared. Norms, activations, the embedding's look-up, the
optimizer and recomputed activations don't count.
"""

from megascale.config.model import ModelConfig


def num_block_weights(config: ModelConfig) -> int:
    """Matrix elements of one block: each takes part in one product per token."""
    qkv = config.d_model * (config.num_heads + 2 * config.kv_heads) * config.head_dim
    num_matrices = 3 if config.is_gated else 2
    return qkv + config.heads_dim * config.d_model + num_matrices * config.d_model * config.ffn_dim


def num_parameters(config: ModelConfig, *, has_padding: bool = True) -> int:
    """All trained parameters, with the vocabulary as padded in memory, or as published when `has_padding` is false."""
    norm = config.d_model * (2 if config.traits.norm == "layer" and config.has_bias else 1)
    up_biases = config.ffn_dim * (2 if config.is_gated else 1)
    qkv_biases = (config.num_heads + 2 * config.kv_heads) * config.head_dim
    biases = (qkv_biases + up_biases + 2 * config.d_model) if config.has_bias else 0
    block = num_block_weights(config) + biases + 2 * norm
    vocabulary = config.padded_vocab_size if has_padding else config.vocab_size
    positions = config.max_seq_len if config.traits.positions == "learned" else 0
    tables = vocabulary * (1 if config.is_tied else 2) + positions
    return config.num_layers * block + norm + tables * config.d_model


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Operations of the forward pass per token of a sequence of `seq_len` tokens: 2N + 4 L D T.

    N are the weights that multiply a token: the blocks and the head, not the tables that are only looked up.
    """
    weights = config.num_layers * num_block_weights(config) + config.d_model * config.padded_vocab_size
    return 2 * weights + 4 * config.num_layers * config.d_model * seq_len


def train_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Operations of forward and backward per token: 6N + 12 L D T."""
    return 3 * forward_flops_per_token(config, seq_len)


def layer_costs(config: ModelConfig, seq_len: int) -> list[float]:
    """Operations of each layer's forward pass per token: the embedding, the blocks, the final norm, the head.

    Embedding and norm have no products; they count as one operation per feature, so that a layer is never free. A cut
    of the model into stages that balances these balances training too, where each is three times as much.
    """
    block = 2 * num_block_weights(config) + 4 * config.d_model * seq_len
    head = 2 * config.d_model * config.padded_vocab_size
    return [config.d_model, *[block] * config.num_layers, config.d_model, head]
