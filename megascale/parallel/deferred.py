"""Weight gradients that wait for their turn, so that a pipeline can send the inputs' gradients first.

Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv 2401.10241, section 2.
"""

from collections.abc import Callable

import torch


class WeightGradients:
    """A queue that linear layers fill in a backward pass and a pipeline schedule empties later.

    Args:
        accumulate: adds a gradient to a parameter's main gradient.
    """

    def __init__(self, accumulate: Callable[[torch.Tensor, torch.Tensor], None]):
        self._accumulate = accumulate
        self._waiting: list[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = []

    def add(self, parameter: torch.Tensor, compute: Callable[[], torch.Tensor]) -> None:
        """Puts off the computation of a parameter's gradient."""
        self._waiting.append((parameter, compute))

    def pop(self) -> Callable[[], None]:
        """Empties the queue; what it returns computes and accumulates the gradients that waited."""
        waiting, self._waiting = self._waiting, []

        def run() -> None:
            with torch.no_grad():
                for parameter, compute in waiting:
                    self._accumulate(parameter, compute())

        return run
