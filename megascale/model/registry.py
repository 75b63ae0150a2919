"""The families by name."""

from megascale.model.families import bert, decoder, moe, palm, t5, vit

FAMILIES = {
    "gpt2": decoder.layer_specs,
    "llama": decoder.layer_specs,
    "moe": moe.layer_specs,
    "palm": palm.layer_specs,
    "bert": bert.layer_specs,
    "t5": t5.layer_specs,
    "transformer": t5.layer_specs,
    "vit": vit.layer_specs,
}
"""Family name -> function that lists the layers of a config."""
SHARED = {"t5": t5.shared_specs}
"""Family name -> function that lists what every rank of a pipeline holds beside its layers; others have nothing."""
