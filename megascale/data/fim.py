"""Fill in the middle: documents rearranged so that a model that reads left to right learns to fill a gap. Pure.

A document becomes, each with probability as configured,

- prefix first (PSM): `[PRE] prefix [SUF] suffix [MID] middle`
- suffix first (SPM): `[PRE] [SUF] suffix [MID] prefix middle`

cut at two places drawn uniformly over its tokens; its end-of-text token stays last. Suffix first is written in the
second of the paper's two ways, under which both kinds continue the text after `[MID]` and help each other.

Source: Bavarian et al. 2022 (arXiv 2207.14255), section 3 and appendix D; StarCoder (Li et al. 2023, arXiv 2305.06161)
writes the same tokens in the same order.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from megascale.data.permutation import derive_key
from megascale.data.row import Row

NUM_FIM_TOKENS = 3
"""Tokens that a rearranged document has more."""
DRAWS = 4
"""Numbers drawn for a piece: whether, which form, and the two cuts."""


@dataclass(frozen=True)
class Fim:
    """How the documents of a corpus are rearranged.

    Attributes:
        prefix_id, middle_id, suffix_id: the three tokens.
        eos_id: the token that ends a document.
        fraction: share of the pieces that are rearranged.
        suffix_first_fraction: share of those that give the suffix first.
    """

    prefix_id: int
    middle_id: int
    suffix_id: int
    eos_id: int
    fraction: float
    suffix_first_fraction: float

    def transform(self, row: Row, key: int) -> Row:
        """Rearranges pieces of a row, which must have room for NUM_FIM_TOKENS more for each.

        Args:
            row: as `Corpus.read` gives it; a part of a longer document is rearranged like a document.
            key: of the row, below 2^64; equal keys give equal rows.
        """
        draws = derive_key(key, np.arange(DRAWS * len(row.ends))).reshape(-1, DRAWS)
        chances = (draws >> np.uint64(11)) * 2.0**-53
        pieces = [
            self._rearrange(row.tokens[start:stop], *drawn)
            for (start, stop), drawn in zip(pairwise([0, *row.ends]), chances.tolist(), strict=True)
        ]
        return row._replace(tokens=np.concatenate(pieces), ends=list(accumulate(map(len, pieces))))

    def _rearrange(
        self, piece: np.ndarray, which: float, form: float, one_cut: float, other_cut: float
    ) -> np.ndarray:
        size = len(piece) - int(piece[-1] == self.eos_id)
        if which >= self.fraction or size == 0:
            return piece
        low, high = sorted((int(one_cut * (size + 1)), int(other_cut * (size + 1))))
        prefix, middle, suffix, end = piece[:low], piece[low:high], piece[high:size], piece[size:]
        pre, mid, suf = np.array([[self.prefix_id], [self.middle_id], [self.suffix_id]], piece.dtype)
        if form < self.suffix_first_fraction:
            return np.concatenate((pre, suf, suffix, mid, prefix, middle, end))
        return np.concatenate((pre, prefix, suf, suffix, mid, middle, end))
