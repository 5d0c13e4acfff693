"""Two ranks, started by torchrun, train as one process does with the samples of both."""


import pytest
import torch
from distributed import scenarios
from distributed.scenarios import COMPARED, TOGETHER
from distributed.torchrun import WORLD, on_two_ranks
from torch import distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found: one pair of processes for all that follows."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(scenarios.__file__, folder, timeout=400)
    return [torch.load(folder / f"found{rank}", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("title", COMPARED)
def test_two_ranks_train_as_one_process_with_the_samples_of_both(title, found):
    function, arguments, how = COMPARED[title]
    expected = function(*arguments, None, **how)
    for rank in range(WORLD):
        actual = found[rank]["compared", title]
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("kind", "title"), [("compared", t) for t in COMPARED] + [("together", t) for t in TOGETHER])
def test_all_ranks_have_the_same_weights_to_the_last_bit(kind, title, found):
    first, second = (each[kind, title] for each in found)
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_perturbation_for_each_rank_is_another_one_than_for_all(found):
    for name in scenarios.GRADIENT:
        local, together = (found[0]["compared", title] for title in (f"local {name}", f"averaged {name} wrapper"))
        assert not all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(local, together, strict=True))
