"""A rank of `megascale parity` with a fault planted, and the command with such ranks for its second layout.

MEGASCALE_TEST_FAULT names the fault; it shows under tp 2 only, as a mistake in tensor parallelism would. Without RANK
in the environment this is the command.
"""

import os
import sys
from dataclasses import replace

import torch

FAULT = os.environ["MEGASCALE_TEST_FAULT"]
OWN_MODULE = "tests.e2e.programs.parity_fault"


def plant() -> None:
    from megascale.model import transformer
    from megascale.model.block import Block
    from megascale.parallel.axis import Axis
    from megascale.train import build

    if FAULT == "initial weight":
        original_init = transformer.initial_value

        def initial_value(name, *arguments):
            value = original_init(name, *arguments)
            return value * 1.001 if name == "blocks.1.feed_forward.output.weight" else value

        transformer.initial_value = initial_value
    elif FAULT == "forward":
        original_forward = Block.forward

        def forward(self, hidden_BTD, context):
            is_bad = self.attention_dropout.site_key == second_block_key() and self.attention.axes.tp.rank == 1
            output_BTD = original_forward(self, hidden_BTD, context)
            return output_BTD + 1e-4 if is_bad else output_BTD

        Block.forward = forward
    elif FAULT == "norm gradients not summed over tp":
        original_placement = transformer.Placement

        def placement(*arguments):
            return replace(original_placement(*arguments), partial_over=Axis())

        transformer.Placement = placement
    elif FAULT == "clipping on one rank":
        original_optimizer = build.build_optimizer

        def build_spoilt(*arguments, **options):
            optimizer = original_optimizer(*arguments, **options)
            if os.environ["RANK"] == "1":
                optimizer.register_step_pre_hook(double_gradients)
            return optimizer

        build.build_optimizer = build_spoilt
    elif FAULT == "norms decay":
        build.is_decayed = lambda name: True


def second_block_key() -> torch.Tensor:
    from megascale.model.seeds import derive_seed

    return torch.tensor(derive_seed("dropout", "blocks.1.attention"))


def double_gradients(optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(2.0)


def run_command() -> None:
    import launcher.parity
    from launcher.cli import main
    from launcher.local import run_local

    def run_with_fault(arguments, num_ranks, module):
        run_local(arguments, num_ranks, OWN_MODULE if num_ranks > 1 else module)

    launcher.parity.run_local = run_with_fault
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:
        from megascale.train.parity import serve_trace
        from megascale.train.request import serve_request

        plant()
        serve_request(serve_trace, sys.argv[1])
    else:
        run_command()
