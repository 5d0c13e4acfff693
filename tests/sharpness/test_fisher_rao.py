"""The Fisher-Rao norm: gradients sample by sample, the identity of chains, what leaves it alone and what does not."""

import copy
import itertools

import pytest
import torch
from curvature.random_networks import FAMILIES
from curvature.undisturbed import assert_undisturbed, snapshot
from hypothesis import given
from hypothesis import strategies as st
from sharpness.networks import (
    assert_same_function,
    chain,
    grown_before_normalisers,
    labelled,
    normalised,
    rescaled_layers,
    rescaled_neurons,
    three_kinds,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from ms_optim import fisher_rao_norm
from ms_optim.errors import CurvatureError, DataError, UnsupportedError


def inner_product(model, x, y, names=None, loss=F.cross_entropy):
    """⟨w, ∇ℓ⟩ of one sample, by its gradient."""
    chosen = [p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)]
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(model(x[None]), y[None])
    grads = torch.autograd.grad(value, chosen, allow_unused=True)
    return sum(float((p * g).sum().detach()) for p, g in zip(chosen, grads, strict=True) if g is not None)


def of_model(model, x, names=None):
    """Σ_y p_y ⟨w, ∇ℓ(y)⟩² of every sample, label by label."""
    total = 0.0
    for sample in x:
        p = model(sample[None]).softmax(-1).detach()[0]
        total += sum(float(p[y]) * inner_product(model, sample, torch.tensor(y), names) ** 2 for y in range(len(p)))
    return total / len(x)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(st.data())
def test_it_is_the_mean_over_all_labels_of_gradients_sample_by_sample(family, data):
    model, x = data.draw(FAMILIES[family]())
    assert fisher_rao_norm(model, x) == pytest.approx(of_model(model, x), rel=1e-10, abs=1e-14)


def test_the_empirical_one_is_that_of_the_labels():
    model, (x, y) = chain(), labelled()
    expected = sum(inner_product(model, *pair) ** 2 for pair in zip(x, y, strict=True)) / len(x)
    assert fisher_rao_norm(model, (x, y), "empirical") == pytest.approx(expected, rel=1e-12)
    targets = torch.randn(12, 3)
    for loss, function in (("mse", F.mse_loss), ("bce_with_logits", F.binary_cross_entropy_with_logits)):
        products = [inner_product(model, *pair, loss=function) for pair in zip(x, targets, strict=True)]
        expected = sum(value**2 for value in products) / len(x)
        assert fisher_rao_norm(model, (x, targets), "empirical", loss=loss) == pytest.approx(expected, rel=1e-12)


def test_labels_drawn_from_the_model_bring_the_empirical_one_to_the_other():
    model, (x, _) = chain(), labelled()
    wide = x.repeat(4000, 1)
    y = torch.multinomial(model(wide).softmax(-1).detach(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    each = [inner_product(model, sample, torch.tensor(k)) ** 2 for sample, k in itertools.product(x, range(3))]
    error = (torch.tensor(each).view(12, 3)[torch.arange(12).repeat(4000), y].std() / len(y) ** 0.5).item()
    value = fisher_rao_norm(model, x)
    assert abs(fisher_rao_norm(model, (wide, y), "empirical") - value) < 4 * error < 0.1 * value


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_chain_of_d_layers_without_biases_has_the_factor_d_squared(depth):
    model, (x, y) = chain(bias=False, sizes=(5, 6, 6, 6, 3)[:depth] + (3,)), labelled()
    logits = model(x).detach()
    p = logits.softmax(-1)
    slopes = (p * logits).sum(-1, keepdim=True) - logits  # ⟨∂ℓ(y)/∂o, o⟩ for every y
    assert fisher_rao_norm(model, x) == pytest.approx(depth**2 * float((p * slopes.square()).sum(-1).mean()), rel=1e-12)
    at_labels = float(slopes.gather(1, y[:, None]).square().mean())
    assert fisher_rao_norm(model, (x, y), "empirical") == pytest.approx(depth**2 * at_labels, rel=1e-12)


@pytest.mark.parametrize("version", ["model", "empirical"])
def test_unchanged_by_every_rescaling(version):
    model, data = chain(), labelled()
    value = fisher_rao_norm(model, data, version)
    assert fisher_rao_norm(rescaled_layers(model, data[0]), data, version) == pytest.approx(value, rel=1e-11)
    assert fisher_rao_norm(rescaled_neurons(model, data[0]), data, version) == pytest.approx(value, rel=1e-11)
    model, data = normalised(), labelled(shape=(2, 4, 4))
    value = fisher_rao_norm(model, data, version)
    assert fisher_rao_norm(rescaled_layers(model, data[0]), data, version) == pytest.approx(value, rel=1e-11)
    assert fisher_rao_norm(grown_before_normalisers(model, data[0]), data, version) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("version", ["model", "empirical"])
def test_changed_by_an_offset_that_moves_from_a_bias_to_a_running_mean(version):
    model, data = normalised(), labelled(shape=(2, 4, 4))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[4].bias += 1.0
        other[5].running_mean += 1.0
    assert_same_function(model, other, data[0])
    value, moved = (fisher_rao_norm(net, data, version) for net in (model, other))
    assert abs(moved - value) > 1e-3 * value


def test_changed_by_an_offset_that_moves_from_one_bias_to_a_later_one():
    model, (x, _) = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), labelled()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias += 1.0
        other[1].bias -= model[1].weight.sum(1)
    assert_same_function(model, other, x)
    assert abs(fisher_rao_norm(other, x) - fisher_rao_norm(model, x)) > 1e-2 * fisher_rao_norm(model, x)


def test_some_parameters_alone():
    model, (x, y) = chain(), labelled()
    names = ["0.weight", "4.bias"]
    assert fisher_rao_norm(model, x, parameters=names) == pytest.approx(of_model(model, x, names), rel=1e-12)
    expected = sum(inner_product(model, *pair, names) ** 2 for pair in zip(x, y, strict=True)) / len(x)
    assert fisher_rao_norm(model, (x, y), "empirical", names) == pytest.approx(expected, rel=1e-12)
    model[0].requires_grad_(False)
    rest = ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert fisher_rao_norm(model, x) == pytest.approx(fisher_rao_norm(model, x, parameters=rest), rel=1e-13)


def test_a_tied_weight_counts_in_both_of_its_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(F.relu(self.b(F.relu(self.a(x)))))

    model, (x, _) = Tied(), labelled()
    assert fisher_rao_norm(model, x) == pytest.approx(of_model(model, x), rel=1e-12)


def test_batches_of_unequal_size_are_one_mean():
    model, (x, y) = chain(), labelled()
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    for version in ("model", "empirical"):
        value = fisher_rao_norm(model, (x, y), version)
        assert fisher_rao_norm(model, loader, version) == pytest.approx(value, rel=1e-13)
        assert value.details == {"samples": 12.0}


@pytest.mark.parametrize("version", ["model", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet"])
def test_the_three_kinds_of_networks_and_nothing_is_disturbed(name, version):
    model, (x, y) = three_kinds()[name]
    model.train()
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    with torch.no_grad():
        value = fisher_rao_norm(model, (x, y), version)
    assert_undisturbed(model, before)
    model.eval()
    if version == "model":
        assert value == pytest.approx(of_model(model, x), rel=1e-9)
    else:
        assert value == pytest.approx(sum(inner_product(model, *p) ** 2 for p in zip(x, y, strict=True)) / len(x))


def test_what_it_cannot_measure_is_refused():
    model, (x, _) = chain(), labelled()
    with pytest.raises(ValueError, match="version must be 'model' or 'empirical', got 'true'"):
        fisher_rao_norm(model, x, "true")
    with pytest.raises(UnsupportedError, match="drawn from softmax probabilities, and loss='mse'"):
        fisher_rao_norm(model, x, loss="mse")
    with pytest.raises(DataError, match="without targets"):
        fisher_rao_norm(model, x, "empirical")
    with pytest.raises(ValueError, match="parameters names '9.weight', not trainable here"):
        fisher_rao_norm(model, x, parameters=["0.weight", "9.weight"])
    with pytest.raises(ValueError, match="is empty"):
        fisher_rao_norm(model, x, parameters=[])
    with pytest.raises(ValueError, match="got the string"):
        fisher_rao_norm(model, x, parameters="0.weight")

    class Backward(torch.autograd.Function):
        """Without a forward-mode derivative."""

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Opaque(nn.Module):
        def forward(self, x):
            return Backward.apply(x)

    with pytest.raises(UnsupportedError, match="forward-mode derivative"):
        fisher_rao_norm(nn.Sequential(model, Opaque()), x)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(CurvatureError, match="not finite|is nan|is inf"):
        fisher_rao_norm(model, x)
