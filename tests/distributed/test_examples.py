"""The examples of distributed training run under torchrun and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

import ms_optim

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
ROOT = Path(ms_optim.__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["with_ddp.py", "with_fsdp2.py"])
def test_an_example_learns_the_digits(example):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / example)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    accuracy = re.search(r"test accuracy ([\d.]+) %", done.stdout)
    assert accuracy and float(accuracy[1]) > 88
