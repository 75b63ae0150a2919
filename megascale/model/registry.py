"""The families by name."""

from megascale.model.families import gpt2, llama

FAMILIES = {"gpt2": gpt2.layer_specs, "llama": llama.layer_specs}
"""Family name -> function that lists the layers of a config."""
