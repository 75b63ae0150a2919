"""Bytes that a rank holds, as the papers have them, beside our own forms (`megascale.model.memory`).

Sources: Rajbhandari et al. 2020 (ZeRO), section 5; Korthikanti et al. 2022, sections 4 and 5, equations 1 to 6.
"""

from bench.layout_cases import LayoutCase
from megascale.model.memory import State


def paper_state(case: LayoutCase, rank: int) -> State:
    """ZeRO's 2 + 2 + K bytes a parameter, K = 12: master and two moments; in fp32 4 + 4 + 8, without a master.

    Source: Rajbhandari et al. 2020, section 3.1 and figure 1.
    """
    share = case.share(rank)
    total, ranks, stage = share.parameters.total, share.zero_ranks, share.parallel.zero_stage
    state_bytes = 8 if case.dtype == "fp32" else 12
    return State(
        parameters=share.bytes * total / (ranks if stage >= 3 else 1),
        gradients=share.bytes * total / (ranks if stage >= 2 else 1),
        optimizer=state_bytes * total / (ranks if stage >= 1 else 1),
    )


def paper_kept(case: LayoutCase) -> float:
    """`s b h (34 / t)` for selective, `s b h (34 + 5 a s / h) / t` for none, `2 s b h` for full; of a GPT-2 block.

    Without sequence shards 10 of the 34 aren't divided by t. Its 16-bit numbers, in our e bytes: 32 e / 2, without the
    dropout masks of one byte each (2 of the residual sums, and one of a s / h), of which we keep none.

    Source: Korthikanti et al. 2022, table 2 and equations 1 to 6.
    """
    share = case.share(0)
    train, tp = share.train, share.parallel.tp
    sbh = share.hidden / share.bytes * (share.bytes / 2)
    if train.recompute == "full":
        return 2 * sbh / (tp if share.parallel.is_sequence_parallel else 1)
    squares = 4 * share.model.num_heads * share.derived.attention_columns / share.model.d_model
    replicated, cut = (8, 24) if not share.parallel.is_sequence_parallel else (0, 32)
    return sbh * (replicated + cut / tp + (squares / tp if train.recompute == "none" else 0))
