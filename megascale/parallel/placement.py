"""Where a rank's part of a parameter lies in the whole, and what this rank has to do with the others about it."""

from dataclasses import dataclass

from megascale.parallel.axis import ALONE, Axis
from megascale.parallel.boxes import Box


@dataclass(frozen=True)
class Placement:
    """One parameter of this rank in global terms.

    Attributes:
        name: global name.
        global_shape: shape of the whole tensor in the unsharded model.
        box: the part of it that this rank's parameter is.
        is_counted: whether this rank stands for this part among the ranks of a replica that hold it too: it alone
            counts it in the gradient norm and writes it to checkpoints.
        partial_over: the axis whose ranks each have only a part of this parameter's gradient, to be summed: tp for
            what works on sequence shards, the pipeline's two ends for a tied embedding. Of size 1: the gradient is
            whole.
        is_expert: whether expert parallelism cuts it: then the ranks that hold the same part are those of
            `Mesh.expert_group`, else those of `Mesh.zero_group`.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    is_counted: bool = True
    partial_over: Axis = ALONE
    is_expert: bool = False
