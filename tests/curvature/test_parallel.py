"""Ranks with parts of the data find what one process finds with all of it, and none is left waiting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from curvature import ranks
from curvature.random_networks import small_mlp
from curvature.ranks import EXACT, SAMPLED, WORLD, batches, described, network
from torch import distributed as dist
from torch import nn

import ms_optim
from ms_optim.curvature import hessian_trace
from ms_optim.curvature.parallel import own_generator, unwrapped

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found: one pair of processes for all that follows."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(ms_optim.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, ranks.__file__, str(rank), str(folder)] for rank in range(WORLD)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)
    return [torch.load(folder / f"found{rank}", weights_only=True) for rank in range(WORLD)]


def assert_equal(actual, expected):
    """All that is described, numbers to 1e-12."""
    for part in ("values", "errors"):
        assert list(actual[part]) == list(expected[part])
        for name, value in expected[part].items():
            scale = float(value.nan_to_num().abs().max()) if value.numel() else 0.0
            torch.testing.assert_close(actual[part][name], value, rtol=1e-12, atol=1e-13 * scale, equal_nan=True)
    for part in ("kind", "samples", "generic"):
        assert actual[part] == expected[part], part
    assert actual["columns"] == pytest.approx(expected["columns"], rel=1e-12)


@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_find_what_one_process_finds_with_all_the_data(case, found):
    measure, split, options = EXACT[case]
    expected = described(measure(network(), batches(split, None), **options))
    for rank in range(WORLD):
        assert_equal(found[rank][case], expected)


class Group:
    """Stands for one rank where the ranks run one after another."""

    def __init__(self, monkeypatch, rank):
        monkeypatch.setattr(dist, "get_rank", lambda group: rank)


@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_sums_are_those_of_independent_ranks(case, found, monkeypatch):
    measure, split, options = SAMPLED[case]
    parts = []
    for rank in range(WORLD):
        generator = own_generator(torch.Generator().manual_seed(0), Group(monkeypatch, rank))
        parts.append(described(measure(network(), batches(split, rank), generator=generator, **options)))
    samples = sum(part["samples"] for part in parts)
    share = [part["samples"] / samples for part in parts]

    def mean(name):
        return sum(s * part["values"][name] for s, part in zip(share, parts, strict=True))

    def error(name):
        return sum((s * part["errors"][name]).square() for s, part in zip(share, parts, strict=True)).sqrt()

    expected = {
        "values": {name: mean(name) for name in parts[0]["values"]},
        "errors": {name: error(name) for name in parts[0]["errors"]},
        "kind": parts[0]["kind"],
        "samples": samples,
        "generic": (),
        "columns": sum(s * part["columns"] for s, part in zip(share, parts, strict=True)),
    }
    for rank in range(WORLD):
        assert_equal(found[rank][case], expected)


def test_equal_seeds_on_equal_data_draw_different_signs(found):
    data = batches("many", None)
    one = hessian_trace(network(), data, 0, generator=torch.Generator().manual_seed(7))
    exact = hessian_trace(network(), data)
    values = found[0]["same data"]["values"]
    assert found[0]["same data"]["samples"] == 2 * one.samples
    weights = [name for name in values if "weight" in name and one[name] != pytest.approx(exact[name], rel=1e-6)]
    assert weights and all(float(values[name]) != pytest.approx(one[name], rel=1e-6) for name in weights)


def test_a_kind_holds_where_it_holds_on_all_ranks_and_a_path_is_told_if_one_took_it(found):
    data = [*batches("many", 0), *(100 * x for x in batches("many", 1))]
    expected = described(hessian_trace(network("switch"), data))
    assert expected["generic"] == ("prototypes",) and set(expected["kind"].values()) == {"hessian", "gauss-newton"}
    for rank in range(WORLD):
        assert_equal(found[rank]["switch"], expected)


FAILURES = {
    "not finite": ("DataError", "batch 1 holds 10 non-finite values", 2),
    "a model's own error": ("KeyError", "inside", None),
    "an interruption": ("KeyboardInterrupt", "", 2),
    "no batch": ("DataError", "holds no batch", None),
    "not split": ("MemoryBudgetError", "max_memory=1 bytes is too small", None),
}


@pytest.mark.parametrize("case", FAILURES)
def test_if_one_rank_fails_all_do(case, found):
    kind, message, partial = FAILURES[case]
    name, text, samples = found[1]["errors"][case]
    assert name == kind and message in text and samples == partial
    name, text, samples = found[0]["errors"][case]
    assert name == "DataError" and "1 of 2 ranks failed" in text and samples is None


def test_a_wrapped_model_is_measured_by_its_inner_names_and_summed_only_on_demand(found):
    whole = described(hessian_trace(network(), batches("uneven", None)))
    for rank in range(WORLD):
        own = described(hessian_trace(network(), batches("uneven", rank)))
        assert_equal(found[rank]["wrapped"], whole)
        assert_equal(found[rank]["alone"], own)
        assert_equal(found[rank]["own group"], own)


def test_ranks_may_have_budgets_of_their_own(found):
    whole = described(hessian_trace(network(), batches("uneven", None)))
    for rank in range(WORLD):
        assert_equal(found[rank]["budget"], whole)


# --- wrappers, in one process -----------------------------------------------------------------------------------------


def wrapped_in_all(model):
    return torch.compile(nn.DataParallel(torch.compile(model)))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, wrapped_in_all])
def test_wrappers_are_taken_off(wrap):
    model, x = small_mlp(), torch.randn(4, 5)
    wrapped = wrap(model)
    assert wrapped is not model and unwrapped(wrapped) is model
    assert dict(hessian_trace(wrapped, x)) == dict(hessian_trace(model, x))


def test_what_is_no_wrapper_is_left_on():
    model = nn.Module()
    model.module = small_mlp()  # a name is no wrapper
    assert unwrapped(model) is model
    assert unwrapped(small := small_mlp()) is small


def test_generators_of_ranks_differ_and_are_reproducible(monkeypatch):
    def first(rank, seed):
        generator = own_generator(torch.Generator().manual_seed(seed), Group(monkeypatch, rank))
        return int(torch.randint(2**62, (), generator=generator))

    assert first(0, 0) == first(0, 0)
    assert len({first(rank, seed) for rank in range(4) for seed in range(3)}) == 12
