"""The `megascale` command, but for its ranks, which run the module named by MEGASCALE_TEST_RANKS."""

import os

import launcher.train
from launcher.cli import main
from launcher.local import run_local


def run_with_test_ranks(arguments: list[str], num_ranks: int) -> None:
    run_local(arguments, num_ranks, os.environ["MEGASCALE_TEST_RANKS"])


if __name__ == "__main__":
    launcher.train.run_local = run_with_test_ranks
    main()
