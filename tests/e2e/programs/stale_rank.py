"""A rank that loads a checkpoint into the master weights and forgets the 16-bit ones that the model computes with."""

import sys

from megascale.engine.flat_zero import FlatZeroOptimizer
from megascale.engine.zero01 import WholeGradientEngine
from megascale.train import rank

if __name__ == "__main__":
    restore, refresh = WholeGradientEngine.restore_scalars, FlatZeroOptimizer.update_lp_params

    def forget(self, scalars):
        FlatZeroOptimizer.update_lp_params = lambda self: None
        restore(self, scalars)
        FlatZeroOptimizer.update_lp_params = refresh

    WholeGradientEngine.restore_scalars = forget
    rank.main(sys.argv[1:])
