"""The families by name."""

from megascale.model.families import decoder

FAMILIES = {"gpt2": decoder.layer_specs, "llama": decoder.layer_specs}
"""Family name -> function that lists the layers of a config."""
