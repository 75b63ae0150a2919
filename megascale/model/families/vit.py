"""Vision transformers: blocks that see an image's patches from both sides, with a head for classes or a decoder of MAE.

LayerNorm before each half of a block, GELU, biases, learned positions and a class token (Dosovitskiy et al. 2020, arXiv
2010.11929). Masked-image pretraining (He et al. 2021, arXiv 2111.06377) has fixed positions, shows the blocks the
visible patches only, and has its decoder in the head.
"""

from functools import partial

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import Block
from megascale.model.image_head import ImageHead
from megascale.model.layers import LayerSpec
from megascale.model.mae_decoder import MaeHead
from megascale.model.norm import build_norm
from megascale.model.patch_embedding import PatchEmbedding


def layer_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The layers of a vision transformer, first to last."""
    names = [f"blocks.{index}" for index in range(config.num_layers)]
    return [
        LayerSpec("embedding", partial(PatchEmbedding, config, axes)),
        *(LayerSpec(name, partial(Block, config, name, axes)) for name in names),
        LayerSpec("final_norm", partial(build_norm, config)),
        LayerSpec("head", partial(MaeHead if config.vision.is_mae else ImageHead, config, axes)),
    ]
