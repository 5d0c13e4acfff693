"""Two ranks, started by torchrun, are told what they do not agree on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkup import ranks
from torch import distributed as dist

import ms_optim

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks was told: one pair of processes for all that follows."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(ms_optim.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, ranks.__file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [torch.load(folder / f"found{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("title", ranks.LOOPS)
def test_every_rank_is_told_its_problems_and_no_others(title, found):
    for rank, expected in enumerate(ranks.LOOPS[title][1]):
        told = found[rank][title]
        assert set(told["problems"]) == expected, told["report"]
        assert told["restored"]


def test_every_rule_about_ranks_has_a_loop_that_breaks_it(found):
    rules = {
        name for name, rule in ms_optim.checkup.examination.RULES.items() if rule.__module__.endswith("rank_rules")
    }
    assert rules <= {name for rank in found for told in rank.values() for name in told["problems"]}
