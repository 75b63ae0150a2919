"""The section that says what a model learns from a row."""

from typing import Annotated, Literal

from pydantic import Field

from megascale.config.base import Section
from megascale.config.families import ObjectiveKind


class ObjectiveConfig(Section):
    """What is hidden from the model, or asked of it. All that is drawn is a function of the run's seed and the row."""

    kind: ObjectiveKind | None = None
    """`causal`: the next token. `mlm`: masked tokens (Devlin et al. 2019, arXiv 1810.04805). `span`: masked spans, by
    a decoder (Raffel et al. 2020, arXiv 1910.10683). `pairs`: a target text from a source text. `classify`: the class
    of an image. `mae`: masked patches (He et al. 2021, arXiv 2111.06377). Empty: what the family is made for."""

    mask_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the tokens or patches that are hidden. Empty: 0.15 for mlm and span, 0.75 for mae."""

    whole_word: bool = False
    """mlm: hide all tokens of a word together, or none."""

    pair_task: Literal["none", "nsp", "sop"] = "none"
    """mlm: whether rows are two segments, and the model also tells if the second follows the first (`nsp`, Devlin et
    al. 2019), or if they are in their order (`sop`, Lan et al. 2019, arXiv 1909.11942)."""

    mask_token: str = "[MASK]"
    """mlm: what stands for a hidden token. It and the next two must be in the tokenizer."""

    cls_token: str = "[CLS]"
    """mlm: begins each row."""

    sep_token: str = "[SEP]"
    """mlm: ends each segment."""

    mean_span_tokens: float = Field(3.0, ge=1)
    """span: mean length of a hidden span, in tokens."""

    target_len: int | None = Field(None, ge=2)
    """Positions of the decoder's rows. Empty: for span, as many as the hidden spans of a full row need; for pairs,
    train.seq_len."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target probability that is spread over all tokens or classes (Szegedy et al. 2015); 0.1 in Vaswani
    et al. 2017, section 5.4. Validation losses are without it."""

    crop_min_fraction: float = Field(1.0, gt=0, le=1)
    """Images: least share of the area that a random crop keeps, which is then resized; 0.08 is usual on ImageNet. 1,
    the default: no crop."""

    flips: bool = False
    """Images: mirror half of them."""

    pixel_mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3, strict=False)] = (0.5,)
    """Images: subtracted from each pixel, which lies in 0 to 1; one number for all colours, or one for each. 0.5 gives
    -1 to 1, as the published ViT takes."""

    pixel_std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=3, strict=False)] = (
        0.5,
    )
    """Images: what the rest is then divided by, likewise."""
