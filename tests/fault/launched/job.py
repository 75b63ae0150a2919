"""The controller of a launched run whose ranks are those of the module named by MEGASCALE_TEST_RANKS."""

import os

from launcher.supervise import attempt, job

if __name__ == "__main__":
    attempt.RANK_MODULE = os.environ["MEGASCALE_TEST_RANKS"]
    job.main()
