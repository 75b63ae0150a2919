"""Whole targets of pairs: whether a model that reads the source alone writes the target to its last token."""

from megascale.data.batch import Batch
from megascale.model.generate import LanguageModel, Sampling, draw_rows
from megascale.model.pair_generate import PairRows


def count_exact(model: LanguageModel, batch: Batch, end: int) -> tuple[int, int]:
    """Rows whose whole target greedy decoding gives, and rows that have a target.

    What was cut to fit a row in training is cut here too: the source that is read, and the target that is asked for.

    Args:
        model: an encoder-decoder in eval mode; ranks that share it all call this with the same batch.
        batch: of `megascale.data.pairs`; on the CPU.
        end: id of the token that ends source and target.

    Cost: a pass over the sources, then one over a position of each row for each token of the longest target.
    """
    rows = [number for number, label in enumerate(batch.labels_BT[:, 0].tolist()) if label >= 0]
    if not rows:
        return 0, 0
    sources = [batch.source_BS[row][batch.source_documents_BS[row] == 0].tolist() for row in rows]
    targets = [batch.labels_BT[row][batch.labels_BT[row] >= 0].tolist() for row in rows]
    longest = max(map(len, targets))
    follow = PairRows(model, sources, 1 + longest, end, use_cache=True)
    steps = list(draw_rows(follow, [[end]] * len(rows), longest, Sampling(temperature=0), end))
    written = [[token for token in tokens if token is not None] for tokens in zip(*steps, strict=True)]
    return sum(found == target for found, target in zip(written, targets, strict=True)), len(rows)
