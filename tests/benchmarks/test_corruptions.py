"""What a trained network withstands: sizes, the adversary's ball, what is rounded, which images are looked at."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ms_optim
from benchmarks import corruptions, problems

ROW = "MNIST 2,000, 20 % noise, MLP"


@pytest.fixture(autouse=True)
def single():
    torch.set_default_dtype(torch.float32)


@given(st.integers(2, 8), st.integers(0, 2**16))
def test_rounding_to_bits_keeps_zero_and_the_largest_and_errs_by_half_a_step(bits, seed):
    torch.set_default_dtype(torch.float64)
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    found = corruptions.rounded(weight, bits)
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    assert float((found - weight).abs().max()) <= float(step) / 2 * (1 + 1e-12)
    assert len(found.unique()) <= 2**bits - 1
    assert float(found.abs().max()) == pytest.approx(float(weight.abs().max()))


@settings(max_examples=4)
@given(st.integers(0, 2**16))
def test_noise_is_relative_to_each_tensor_so_that_equivalent_networks_suffer_alike(seed):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    model = ms_optim.models.MLP((6, 5, 4, 3))
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    group = ms_optim.scale_symmetries(model, x)

    def logits(name, size):
        steps = corruptions.steps(model, name, size, (x, y), torch.Generator().manual_seed(1))
        with corruptions.moved(model, steps):
            return model(x).detach()

    for name, size in (("gaussian", 0.3), ("adversarial", 0.2)):
        before = logits(name, size)
        group.rescale_(model, group.random(0.5))
        assert torch.allclose(logits(name, size), before, rtol=1e-8, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_adversary_stays_in_its_ball_and_does_more_than_one_step_chance_or_the_other_way(seed):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    model = ms_optim.models.MLP((6, 5, 3))
    x, y = torch.randn(9, 6), torch.randint(3, (9,))

    def loss(steps):
        with corruptions.moved(model, steps), torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(x), y))

    def size(steps):
        ratios = [float(step.norm() / p.detach().norm()) for step, p in zip(steps, model.parameters(), strict=True)]
        return math.hypot(*ratios)

    worst = corruptions.steps(model, "adversarial", 0.05, (x, y), torch.Generator())
    assert 0.0 < size(worst) <= 0.05 * (1 + 1e-12)
    norms = [p.detach().norm() for p in model.parameters()]
    slope = corruptions.gradient(model, (x, y))
    once = [t**2 * g for t, g in zip(norms, slope, strict=True)]
    once = [0.05 / size(once) * step for step in once]
    chance = [torch.randn_like(step) for step in worst]
    chance = [0.05 / size(chance) * step for step in chance]
    assert loss(worst) >= loss(once) - 1e-4 and loss(worst) > loss(chance) and loss(worst) > loss([-e for e in worst])


def test_weights_come_back_to_the_bit():
    model = ms_optim.models.MLP((6, 5, 3))
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    steps = corruptions.steps(model, "adversarial", 0.2, (x, y), torch.Generator())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), corruptions.moved(model, steps):
        assert not torch.equal(before[0], model[1].weight)
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gains_and_biases_keep_their_bits_whatever_their_shape_is():
    model = problems.PROBLEMS["CIFAR-10 2,000, ResMLP"].build()
    steps = corruptions.steps(model, "bits", 2, (torch.empty(0), torch.empty(0)), torch.Generator())
    moved = {name for (name, _), step in zip(model.named_parameters(), steps, strict=True) if step.any()}
    # (The head is 0 at first, and stays so.)
    assert moved == {name for name, _ in model.named_parameters() if name.endswith("weight")} - {"head.weight"}


def test_an_erased_square_has_the_share_of_the_side():
    x = torch.randn(5, 3, 8, 8)
    shown = corruptions.erased(x, 0.5, torch.Generator().manual_seed(0))
    assert ((shown != x).any(1).sum((1, 2)) == 16).all()


def test_what_is_corrupted_is_of_all_classes_though_the_files_come_class_by_class():
    labels = torch.arange(10).repeat_interleave(500)
    images = labels[:, None, None, None].expand(-1, 1, 8, 8).float()
    given = problems.Data((images[:9], labels[:9]), (images[:9], labels[:9]), (images, labels))
    seen = []

    def accuracy(model, x, y):
        seen.append(y)
        return 0.5

    corruptions.withstood(problems.problem_of(ROW, "smoke").build(), given, accuracy)
    assert all(torch.equal(y, seen[0]) for y in seen) and len(seen[0]) == corruptions.TEST
    # Of each class 200 are expected, with a standard deviation of 10.4.
    assert 150 < int(seen[0].bincount().min()) and int(seen[0].bincount().max()) < 250
