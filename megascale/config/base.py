"""The base of every config section: frozen, strict, and documented field by field."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a run's config.

    A field's docstring is its documentation: it names the unit, the reason for the default and the source of a magic
    number. It ends up in the JSON schema that editors show, and a test refuses a field without one.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
