"""What the fork server of `warm_rank` imports. For no other process: it hides the GPUs that tests may want."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # before torch reads them

import deepspeed  # noqa: F401
import torch._dynamo  # noqa: F401

import megascale.train.session  # noqa: F401
