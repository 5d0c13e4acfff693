"""Discovery: the group found is the group declared, and looking for it disturbs nothing."""

from functools import cache

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import ZOO, Network, mlp, with_lived_in_statistics

from ms_optim.batch import Batch
from ms_optim.errors import DataError, NoEffectWarning, SymmetryError
from ms_optim.symmetry import ScaleGroup, scale_symmetries
from ms_optim.symmetry.invariance import relative_difference, set_training, undisturbed


@cache
def discovered(network: Network) -> tuple[nn.Module, ScaleGroup]:
    """A model and its group, for tests that change neither."""
    model = network.build()
    if network.generators:
        return model, scale_symmetries(model, network.inputs(4))
    with pytest.warns(NoEffectWarning):
        return model, scale_symmetries(model, network.inputs(4))


def same_space(a, b) -> bool:
    ranks = [int(torch.linalg.matrix_rank(m)) if m.numel() else 0 for m in (a, b, torch.cat([a, b]))]
    return ranks[0] == ranks[1] == ranks[2] == len(a) == len(b)


@pytest.mark.parametrize("network", ZOO, ids=str)
def test_group_found_equals_group_declared(network):
    model, group = discovered(network)
    assert group.parameters == tuple(name for name, _ in model.named_parameters())
    assert same_space(group.generators, network.declared(group.parameters)), str(group)


@pytest.mark.parametrize("network", ZOO, ids=str)
def test_function_is_unchanged_by_the_scale_group(network):
    model, group = discovered(network)
    inputs = network.inputs(6)
    assert (group.inexact_normalizers == 0) == network.exact
    for _ in range(3):
        check = group.check(model, inputs, std=1.0, tolerance=1e-12 if network.exact else 1e-2)
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) and network.exact:
            assert check.training_error < 1e-12
        # `random` draws from torch's stream, which `check` puts back.
        torch.rand(1)


@pytest.mark.parametrize("network", [n for n in ZOO if n.generators], ids=str)
def test_the_group_is_all_there_is(network):
    """A step off the group changes the logits: no rescaling direction was missed by the rules on these networks."""
    model, group = discovered(network)
    batch = Batch.of(network.inputs(6), model)
    weights = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    generators = group.generators
    trainable = torch.tensor([float(p.requires_grad) for p in model.parameters()])
    # Softmax does not see a bias of the keys: it shifts all scores of a query alike. That is no scale symmetry.
    without_effect = ("spare.weight", "spare.bias", "key.bias")
    used = [i for i, name in enumerate(group.parameters) if name not in without_effect and trainable[i]]
    for i in used:
        a = torch.zeros(len(group.parameters))
        a[i] = 1.0
        off = a - generators.T @ torch.linalg.lstsq(generators.T, a).solution
        if off.norm() < 1e-9:
            continue
        moved = {name: w * off[j].mul(0.3).exp() for j, (name, w) in enumerate(weights.items())}
        with undisturbed(model):
            error = max(relative_difference(model, batch, weights, moved, training)[0] for training in (False, True))
        # Statistics of BatchNorm stand still here, so a scale they would carry is seen as a change; that is no loss.
        assert error > 1e-6, f"{group.parameters[i]} moves without effect, but not in the group"


@st.composite
def random_networks(draw):
    """Sequences of linear layers or convolutions with any of: bias, BatchNorm, activation, residual sum, pooling."""
    channels, layers = 3, []
    convolutional = draw(st.booleans())
    linear = (lambda i, o, b: nn.Conv2d(i, o, 3, padding=1, bias=b)) if convolutional else nn.Linear
    norm = nn.BatchNorm2d if convolutional else nn.BatchNorm1d

    def layer(i, o):
        parts = [linear(i, o, draw(st.booleans()))]
        if draw(st.booleans()):
            parts.append(norm(o, affine=draw(st.booleans())))
        parts.append(draw(st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.Identity()])))
        return nn.Sequential(*parts)

    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.integers(2, 5))
        block = layer(channels, width)
        if draw(st.booleans()):
            branch = nn.Sequential(*(layer(width, width) for _ in range(draw(st.integers(1, 2)))))
            block = nn.Sequential(block, Sum(branch))
        layers.append(block)
        channels = width
    if convolutional:
        layers += [draw(st.sampled_from([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)])), nn.Flatten()]
    layers.append(nn.Linear(channels, 3, bias=draw(st.booleans())))
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, norm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model, torch.randn((5, 3, 4, 4) if convolutional else (5, 3))


class Sum(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


@given(random_networks(), st.floats(0.1, 1.5), st.integers(0, 1000))
def test_function_of_random_networks_is_unchanged_by_the_scale_group(pair, std, seed):
    model, inputs = pair
    model.eval()
    group = scale_symmetries(model, inputs)
    before = model(inputs)
    t = group.bound(model, group.random(std, torch.Generator().manual_seed(seed)))
    group.rescale_(model, t)
    assert torch.allclose(model(inputs), before, rtol=1e-10, atol=1e-11 * float(before.detach().abs().max()))


def built(name: str) -> nn.Module:
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with_lived_in_statistics(module)
    return model


@pytest.mark.parametrize(
    ("name", "size", "count", "exact"),
    [
        ("resnet18", 64, 32, True),
        ("vgg11", 32, 10, True),
        ("vit_tiny_patch16_224", 224, 26, False),
        ("convnext_atto", 64, 45, False),
        pytest.param("resnet50", 64, 90, True, marks=pytest.mark.slow),
    ],
)
def test_groups_of_timm_models_have_the_known_dimension(name, size, count, exact):
    torch.manual_seed(0)
    model, inputs = built(name), torch.randn(2, 3, size, size)
    group = scale_symmetries(model, inputs)
    assert len(group) == count == int(torch.linalg.matrix_rank(group.generators))
    assert bool((group.generators == group.generators.round()).all())
    check = group.check(model, inputs, std=0.5, tolerance=1e-12 if exact else None)
    assert (check.eval_error > 1e-12) == (not exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnetv2_50", 64), ("densenet121", 64), ("efficientnet_b0", 64), ("mobilenetv3_small_050", 64),
     ("regnetx_002", 64), ("mixer_s32_224", 224), ("resmlp_12_224", 224)],
)  # fmt: skip
def test_function_of_timm_models_is_unchanged(name, size):
    model, inputs = built(name), torch.randn(2, 3, size, size)
    group = scale_symmetries(model, inputs)
    assert len(group) > 0
    group.check(model, inputs)


def test_the_basis_is_sparse_ordered_and_positive_first():
    group = scale_symmetries(built("resnet18"), torch.randn(2, 3, 64, 64))
    first = [int(row.nonzero()[0, 0]) for row in group.generators]
    assert first == sorted(first)
    assert all(float(row[i]) > 0 for row, i in zip(group.generators, first, strict=True))
    # 18 convolutions and γ, β pairs alone (20 + 2 x 20 entries, of which the stem's stage has one basis vector) and fc.
    assert int(group.generators.count_nonzero()) == 61
    assert group.generators.abs().max() == 1


def test_a_second_discovery_finds_the_same_basis():
    model, inputs = built("resnet18"), torch.randn(2, 3, 64, 64)
    assert torch.equal(scale_symmetries(model, inputs).generators, scale_symmetries(model, inputs).generators)


class Moody(nn.Module):
    """Fails in training mode, after it has drawn random numbers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))

    def forward(self, x):
        x = self.net(x)
        if self.training and x.sum() > 0:
            return -x
        return x


def observable(model):
    return {
        "tensors": [t.clone() for t in (*model.parameters(), *model.buffers())],
        "addresses": [t.data_ptr() for t in (*model.parameters(), *model.buffers())],
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, dict)):
        pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else list(zip(a, b, strict=True))
        return all(same(x, y) for x, y in pairs)
    return a == b


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_discovery_and_check_disturb_nothing(training, fails):
    model = Moody() if fails else Moody().net
    model.train(training)
    model.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm1d) else None)
    next(model.parameters()).requires_grad_(False)
    inputs = torch.randn(6, 5)
    (model.net if fails else model)(inputs).square().sum().backward()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    before = observable(model)
    if fails:
        with pytest.raises(SymmetryError, match="Moody cannot be read by torch.export in training mode"):
            scale_symmetries(model, inputs)
    else:
        scale_symmetries(model, inputs).check(model, inputs)
    assert calls
    assert same(observable(model), before)


def test_a_model_that_cannot_be_exported_is_named_with_the_reason_and_a_way_out():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else -self.fc(x)

    with pytest.raises(SymmetryError, match=r"Branching .* evaluation mode: .*; rewrite .* group=") as error:
        scale_symmetries(Branching(), torch.randn(2, 5))
    assert "\n" not in str(error.value)


def test_an_output_without_logits_is_a_data_error():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x), x

    with pytest.raises(DataError, match="tuple without a tensor `.logits`"):
        scale_symmetries(Pair(), torch.randn(2, 5))


def test_targets_of_a_batch_are_not_read():
    model, x = mlp(nn.ReLU), torch.randn(4, 5)
    assert len(scale_symmetries(model, (x, torch.zeros(4, dtype=torch.long)))) == len(scale_symmetries(model, x))


def test_every_opaque_operation_is_reported_once_with_its_place():
    with pytest.warns(NoEffectWarning, match=r"Sequential has no scale symmetry.* aten.gelu.default \(2 x\)"):
        group = scale_symmetries(mlp(nn.GELU), torch.randn(4, 5))
    assert [(o.operation, o.where) for o in group.opaque] == [("aten.gelu.default", "1"), ("aten.gelu.default", "3")]
    assert all(o.reason for o in group.opaque)


def test_operations_on_inputs_alone_are_not_reported():
    class Preprocessing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(nn.ReLU)

        def forward(self, x):
            return self.body(torch.sigmoid(x) + 1)

    group = scale_symmetries(Preprocessing(), torch.randn(4, 5))
    assert len(group) == 2 and group.opaque == ()


def test_statistics_that_something_else_reads_do_not_move():
    class Peeking(nn.Module):
        """Adds to the logits what depends on the running variance."""

        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.out = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.norm(self.fc(x)).relu()) + self.norm.running_var.sum()

    model, inputs = with_lived_in_statistics(Peeking()), torch.randn(4, 5)
    group = scale_symmetries(model, inputs)
    assert len(group) == 1
    group.check(model, inputs, tolerance=1e-12)


def test_a_buffer_that_is_written_from_an_activation_fixes_its_scale():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
            self.register_buffer("centre", torch.zeros(4))

        def forward(self, x):
            x = self.first(x).relu()
            if self.training:
                self.centre.mul_(0.9).add_(0.1 * x.detach().mean(0))
                return self.out(x)
            return self.out(x - self.centre)

    with pytest.warns(NoEffectWarning):
        assert len(scale_symmetries(Cache(), torch.randn(4, 5))) == 0


def test_batch_norms_that_share_statistics_share_their_scale():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(5, 4), nn.Linear(5, 4), nn.BatchNorm1d(4)
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.norm(self.a(x)) + self.norm(self.b(x)))

    model, inputs = with_lived_in_statistics(Shared()), torch.randn(4, 5)
    group = scale_symmetries(model, inputs)
    columns = dict(zip(group.parameters, group.generators.T, strict=True))
    assert len(group) == 2 and len(group.statistics) == 1
    assert torch.equal(columns["a.weight"], columns["b.weight"]) and bool(columns["a.weight"].any())
    group.check(model, inputs, tolerance=1e-12)


def test_modes_are_set_past_a_train_of_the_models_own():
    class Merging(nn.Sequential):
        def train(self, mode=True):
            raise AssertionError("train() of the model was called")

    model = Merging(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert len(scale_symmetries(model, torch.randn(4, 5))) == 1
    set_training(model, False)
    assert not any(m.training for m in model.modules())


@pytest.mark.cuda
def test_discovery_on_a_cuda_model_leaves_its_random_stream(device):
    model = mlp(nn.ReLU).to("cuda")
    state = torch.cuda.get_rng_state()
    group = scale_symmetries(model, torch.randn(4, 5, device="cuda"))
    group.check(model, torch.randn(4, 5, device="cuda"), tolerance=1e-12)
    assert len(group) == 2 and torch.equal(torch.cuda.get_rng_state(), state)
