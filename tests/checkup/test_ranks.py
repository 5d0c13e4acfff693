"""Two ranks, started by torchrun, are told what they do not agree on."""

import pytest
import torch
from checkup import ranks
from distributed.torchrun import on_two_ranks
from torch import distributed as dist

import ms_optim

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks was told: one pair of processes for all that follows."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(ranks.__file__, folder)
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
