"""BERT: an encoder that sees both ways and learns to fill in masked tokens, and whether two segments belong together.

Embeddings of token, position and segment; blocks with their norms after each sum; a head that transforms each position
once more before the product with the embedding (Devlin et al. 2019, arXiv 1810.04805, section 3 and appendix A.2).
"""

from functools import partial

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import PostNormBlock
from megascale.model.layers import LayerSpec
from megascale.model.masked_head import MaskedHead
from megascale.model.segment_embedding import SegmentEmbedding


def layer_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The layers of a BERT, first to last. There is no final norm: a block ends with one."""
    names = [f"blocks.{index}" for index in range(config.num_layers)]
    tied = {"weight": "embedding.tokens.weight"} if config.is_tied else {}
    return [
        LayerSpec("embedding", partial(SegmentEmbedding, config, axes)),
        *(LayerSpec(name, partial(PostNormBlock, config, name, axes)) for name in names),
        LayerSpec("head", partial(MaskedHead, config, axes), tied),
    ]
