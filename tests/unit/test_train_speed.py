"""What the speed of a step is told by, in each kind of run."""

from types import SimpleNamespace

import pytest

from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.data.ledger import StepCounts
from megascale.train.loop import worked_tokens
from tests.support.ranks import REPOSITORY

LABELS = StepCounts(labels=77, digest_sum=0, read=())


def worked(name: str, step: int, *overrides: str) -> int:
    """For a step of that run of one rank which has 77 labels."""
    config = load_config(REPOSITORY / f"configs/run/{name}.yaml", overrides)
    return worked_tokens(SimpleNamespace(config=config, derived=derive(config, 1, source=name)), step, LABELS)


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_gpt"])
def test_of_next_tokens_the_labels_count(name):
    """Padding is no work, and each label of a mixture of experts counts once, however many experts it has."""
    assert worked(name, 0) == LABELS.labels


@pytest.mark.parametrize(("name", "positions"), [
    ("tiny_bert", 64), ("tiny_t5", 128), ("tiny_translate", 16), ("tiny_vit", 16), ("tiny_mae", 16),
])
def test_elsewhere_all_positions_of_the_rows_count(name, positions):
    """Masked tokens, targets, one class of an image, hidden patches: fewer have labels than are worked on, and FLOPs
    are told per position of a row, too. Seen to catch: labels counted; the rows of the last step for all steps.
    """
    ramp = f"train.batch_ramp=[{{until_step: 5, global_batch_tokens: {8 * positions}}}]"
    sizes = ("train.micro_batch_size=2", f"train.global_batch_tokens={16 * positions}", ramp)
    assert [worked(name, step, *sizes) for step in (0, 4, 5)] == [8 * positions, 8 * positions, 16 * positions]
