"""`megascale import`: a run that begins with given weights, made by a process that has torch."""

from collections.abc import Sequence
from pathlib import Path

from launcher.request import FRUGAL_ENVIRONMENT, run_request
from megascale.config.load import load_config
from megascale.errors import ConfigError

IMPORT_MODULE = "megascale.export.import_run"


def import_weights(
    config_path: Path | None, source: str | None, overrides: Sequence[str], *, is_fresh: bool,
    allows_other_tokenizer: bool,
) -> None:
    """Makes the run folder of a config with a checkpoint of step 0 that holds the source's weights.

    Raises:
        ConfigError: an argument is missing, or the config can't be read.
        RankFailedError: the importing process failed, for the reason in its message.
    """
    if config_path is None or source is None:
        raise ConfigError(
            "megascale import needs a CONFIG and a SOURCE: a Hugging Face folder, hf://ORG/NAME, a RUN or RUN@STEP;"
            " megascale import --show SOURCE prints the model section to put into CONFIG"
        )
    load_config(config_path, overrides)
    run_request(IMPORT_MODULE, {
        "show": False, "config": str(config_path), "overrides": list(overrides), "source": source, "fresh": is_fresh,
        "allow_other_tokenizer": allows_other_tokenizer,
    }, FRUGAL_ENVIRONMENT)


def show_section(source: str) -> None:
    """Prints the `model` section of a source as YAML.

    Raises:
        RankFailedError: it has none, for the reason in the message.
    """
    run_request(IMPORT_MODULE, {"show": True, "source": source})
