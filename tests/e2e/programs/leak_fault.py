"""The `megascale` command with ranks whose attention mask forgets documents. With RANK in the environment, such a rank.
"""

import os
import sys
from pathlib import Path

OWN_MODULE = "tests.e2e.programs.leak_fault"


def run_command() -> None:
    import launcher.leak
    from launcher.cli import main

    launcher.leak.LEAK_MODULE = OWN_MODULE
    main()


def run_rank() -> None:
    from megascale.model import attention_mask
    from megascale.train.leak import run_leak_test
    from megascale.train.request import serve_request

    visible = attention_mask.visible
    attention_mask.visible = lambda queries_T, keys_S, _queries, _keys, *others, **options: visible(
        queries_T, keys_S, None, None, *others, **options
    )
    serve_request(lambda values: run_leak_test(Path(values["config"]), values["overrides"]), sys.argv[1])


if __name__ == "__main__":
    run_rank() if "RANK" in os.environ else run_command()
