"""Random networks for the laws of curvature: small enough for brute force, odd enough to find what was not thought of.

Every strategy draws ``(model, inputs)`` in float64, in evaluation mode, with normalisers whose statistics and affine
parameters are nowhere near 0 and 1.
"""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

PIECEWISE_LINEAR = [nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.2, inplace=True), nn.ReLU6]
SMOOTH = [nn.GELU, nn.Tanh, lambda: nn.SiLU(inplace=True)]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {
    1: [nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d],
    2: [nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d],
    3: [nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d],
}


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Positions(nn.Module):
    """x + a parameter that is broadcast along the batch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x + self.table


class Attention(nn.Module):
    """One head of scaled dot-product attention."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


class Matrices(nn.Module):
    """Functional code over parameters w₀ … wₘ₋₁, all [D, D], and a head: ``steps`` are (how, which) pairs."""

    def __init__(self, width: int, classes: int, count: int, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.w = nn.ParameterList(torch.randn(width, width) / width**0.5 for _ in range(count))
        self.head, self.b = nn.Parameter(torch.randn(classes, width)), nn.Parameter(torch.randn(classes))
        self.steps = steps

    def forward(self, x):
        for how, index in self.steps:
            w = self.w[index]
            if how == "linear":
                x = F.relu(F.linear(x, w))
            elif how == "transposed":
                x = F.relu(F.linear(x, w.t()))
            elif how == "matmul":
                x = F.leaky_relu(x @ w)
            elif how == "view":
                x = (x @ w.T).relu_()
            elif how == "residual":
                x = x + x @ w.mT
            elif how == "parallel":
                x = F.linear(F.relu(x), w) - F.relu_(F.linear(-x, w))
            else:
                x = x.clamp(-1.0, 1.0).addmm(x, w)
        return F.linear(x, self.head) + self.b

    def extra_repr(self) -> str:
        return f"{len(self.w)} matrices, {self.steps}"


def settled(model: nn.Module) -> nn.Module:
    """Give every normaliser statistics and affine parameters of its own, and switch to evaluation."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3.0)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    return model.eval()


def at_batch_statistics(model, x):
    """A copy in evaluation mode whose BatchNorms remember this batch, by PyTorch's own bookkeeping."""
    model = copy.deepcopy(model).train()
    counts = {}
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = 1.0
        norm.register_forward_pre_hook(lambda m, a: counts.__setitem__(m, a[0].numel() // a[0].shape[1]))
    model(x)
    for norm, count in counts.items():
        norm.running_var *= (count - 1) / count  # PyTorch stores the unbiased variance and normalises by the biased one
    return model.eval()


def small_mlp(classes=6, features=5, width=7):
    """5 features, 7 hidden units, 6 classes."""
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))


@st.composite
def mlps(draw):
    """Linear layers with and without biases, residual sums, three normalisers, kinked and smooth activations."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.sampled_from([2, 4]))
    samples, features, classes = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    layers: list[nn.Module] = []
    size = features
    for _ in range(draw(st.integers(0, 2))):
        layers.append(nn.Linear(size, width, bias=draw(st.booleans())))
        norm = draw(st.sampled_from([None, None, nn.BatchNorm1d, nn.LayerNorm, lambda w: nn.GroupNorm(w // 2, w)]))
        layers += [] if norm is None else [norm(width)]
        layers.append(draw(st.sampled_from(2 * PIECEWISE_LINEAR + SMOOTH))())
        if draw(st.booleans()):
            layers.append(Residual(nn.Sequential(nn.Linear(width, width, bias=draw(st.booleans())), nn.ReLU())))
        size = width
    layers.append(nn.Linear(size, classes, bias=draw(st.booleans())))
    return settled(nn.Sequential(*layers)), torch.randn(samples, features)


@st.composite
def convolutional_networks(draw):
    """Convolutions in 1 to 3 dimensions with every option, pooling, normalisers, a residual sum."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.integers(1, 3))
    size = {1: 6, 2: 5, 3: 4}[dims]
    groups, channels = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 4]))
    samples, classes = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    convolution = CONVOLUTIONS[dims](
        2,
        channels,
        draw(st.integers(1, 3 if dims < 3 else 2)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    )
    layers: list[nn.Module] = [convolution]
    norm = draw(st.sampled_from([None, BATCH_NORMS[dims], lambda c: nn.GroupNorm(c // 2, c)]))
    layers += [] if norm is None else [norm(channels)]
    layers.append(draw(st.sampled_from(3 * PIECEWISE_LINEAR + SMOOTH))())
    if draw(st.booleans()):
        mixing = CONVOLUTIONS[dims](channels, channels, 1, bias=draw(st.booleans()))
        layers += [Residual(mixing), nn.ReLU(inplace=True)]
    settled(nn.Sequential(*layers))
    places = min(nn.Sequential(*layers)(torch.zeros(1, 2, *[size] * dims)).shape[2:])
    if draw(st.booleans()):
        layers.append(draw(st.sampled_from(POOLS[dims]))(2 if places > 1 else 1))
    layers.append(nn.Flatten())
    features = nn.Sequential(*layers)(torch.zeros(1, 2, *[size] * dims)).shape[1]
    layers.append(nn.Linear(features, classes, bias=draw(st.booleans())))
    return nn.Sequential(*layers).eval(), torch.randn(samples, 2, *[size] * dims)


@st.composite
def token_networks(draw):
    """Linear layers over positions, positional parameters, attention, LayerNorm."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    samples, tokens, classes = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(st.integers(2, 3))
    width, bias = 4, draw(st.booleans())
    layers: list[nn.Module] = [nn.Linear(2, width, bias)]
    for part in draw(
        st.lists(st.sampled_from(["position", "attention", "norm", "relu", "gelu", "linear"]), max_size=4)
    ):
        layers.append(
            {
                "position": lambda: Positions(*draw(st.sampled_from([(1, tokens, width), (tokens, width), (width,)]))),
                "attention": lambda: Residual(Attention(width, bias)),
                "norm": lambda: nn.LayerNorm(draw(st.sampled_from([(width,), (tokens, width)]))),
                # In place, except on what another ReLU keeps for its own backward pass.
                "relu": lambda: nn.ReLU(inplace=not isinstance(layers[-1], nn.ReLU)),
                "gelu": nn.GELU,
                "linear": lambda: nn.Linear(width, width, bias),
            }[part]()
        )
    layers += [Mean(), nn.Linear(width, classes, bias)]
    return settled(nn.Sequential(*layers)), torch.randn(samples, tokens, 2)


@st.composite
def functional_networks(draw):
    """Matrices used once, several times in series or in parallel, as they are or transposed, in functional code."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    samples, width, classes = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 3))
    count = draw(st.integers(1, 2))
    how = st.sampled_from(["linear", "transposed", "matmul", "view", "residual", "parallel", "addmm"])
    steps = draw(st.lists(st.tuples(how, st.integers(0, count - 1)), max_size=3))
    return Matrices(width, classes, count, steps).eval(), torch.randn(samples, width)


FAMILIES = {
    "mlp": mlps,
    "convolution": convolutional_networks,
    "tokens": token_networks,
    "functional": functional_networks,
}
