"""PaLM: attention and feed-forward side by side, with LayerNorm, rotary positions, SwiGLU, no biases and a tied head.

Its published shapes share one key-value head among all query heads (`num_kv_heads: 1`), and have heads of 256 features
whatever the width (`head_width`) (Chowdhery et al. 2022, section 2).
"""

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import ParallelBlock
from megascale.model.families import decoder
from megascale.model.head import Head
from megascale.model.layers import LayerSpec


class PalmHead(Head):
    """A tied head sees the residual stream divided by sqrt(D), since embeddings begin with variance 1.

    Source: Chowdhery et al. 2022, section 5.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__(config, axes)
        if config.is_tied:
            self.scale *= config.d_model**-0.5


def layer_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The layers of the model, first to last."""
    return decoder.layer_specs(config, axes, ParallelBlock, PalmHead)
