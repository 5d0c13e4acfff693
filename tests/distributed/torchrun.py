"""Scripts started on two ranks by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import ms_optim

ROOT = Path(ms_optim.__file__).parents[1]
WORLD = 2


def on_two_ranks(script, *arguments, timeout=300):
    """Run a script on two ranks; what they printed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command = [*launcher, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
