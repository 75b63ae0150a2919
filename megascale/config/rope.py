"""The section that stretches rotary positions to contexts longer than a model was trained on."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megascale.config.base import Section


class RopeScalingConfig(Section):
    """How rotary wavelengths are changed for longer contexts."""

    kind: Literal["linear", "llama3", "yarn"]
    """`linear` divides positions (Chen et al. 2023, arXiv 2306.15595); `llama3` divides the slow frequencies and
    blends the middle ones; `yarn` the same by a ramp over frequencies, with a factor on the scores (Peng et al. 2023,
    arXiv 2309.00071)."""

    factor: float = Field(gt=1)
    """How many times longer the context becomes."""

    original_seq_len: int = Field(ge=1)
    """Longest sequence before, in tokens."""

    low_freq_factor: float = Field(1.0, gt=0)
    """`llama3`: wavelengths over original_seq_len / this are divided by the whole factor."""

    high_freq_factor: float = Field(4.0, gt=0)
    """`llama3`: wavelengths under original_seq_len / this stay."""

    beta_fast: float = Field(32.0, gt=0)
    """`yarn`: frequencies that turn more often than this over the original context stay."""

    beta_slow: float = Field(1.0, gt=0)
    """`yarn`: frequencies that turn less often than this are divided by the whole factor."""

    @model_validator(mode="after")
    def check_ramp(self) -> Self:
        """Refuses a ramp whose ends are the wrong way round."""
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"model.rope_scaling.{low} = {getattr(self, low):g} isn't under {high} = {getattr(self, high):g}:"
                    f" frequencies between them are blended; leave both out for 1 and"
                    f" {type(self).model_fields[high].default:g}"
                )
        return self
