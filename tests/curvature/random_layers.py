"""Every kind of layer with every option, on random shapes: strategies of ``(model, inputs)`` for the laws of curvature.

A layer stands between a number of its own, by which its input is multiplied or not (so that autograd knows where the
input comes from, or does not), and a fixed nonlinear readout of three logits.
"""

from __future__ import annotations

import torch
from curvature.random_networks import CONVOLUTIONS, settled
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class Measured(nn.Module):
    """tanh(layer(s·x)) · readout."""

    classes = 3

    def __init__(self, layer: nn.Module, x: torch.Tensor, scaled: bool) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.tensor(1.3)) if scaled else None
        self.register_buffer("readout", torch.ones(1, 1))
        width = self.before(x).shape[1]
        self.readout = torch.randn(width, self.classes) * (2.0 / width**0.5)

    def before(self, x):
        out = self.layer(x if self.scale is None else x * self.scale)
        return out.flatten(1)

    def forward(self, x):
        return torch.tanh(self.before(x)) @ self.readout


class Function(nn.Module):
    """``function(x, *parameters)``."""

    def __init__(self, function, *shapes) -> None:
        super().__init__()
        self.p = nn.ParameterList(torch.randn(shape) + 0.1 for shape in shapes)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.p)


def measured(draw, layer, *sample, scaled=None):
    """A settled network around a layer, and inputs of a random number of samples."""
    x = torch.randn(draw(st.integers(1, 4)), *sample)
    settled(layer)
    for parameter in layer.parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 0.5)
    scaled = draw(st.booleans()) if scaled is None else scaled
    return Measured(layer, x, scaled).eval(), x


def seed(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))


def size(low=1, high=4):
    return st.integers(low, high)


@st.composite
def linear(draw):
    """Linear layers on any number of dimensions."""
    seed(draw)
    inputs, outputs = draw(size()), draw(size())
    axes = draw(st.lists(size(1, 3), max_size=3))
    return measured(draw, nn.Linear(inputs, outputs, draw(st.booleans())), *axes, inputs)


@st.composite
def functional_linear(draw):
    """Matrices in every form they are written in."""
    seed(draw)
    i, o = draw(size()), draw(size())
    axes = draw(st.lists(size(1, 3), max_size=2))
    how, shapes = draw(
        st.sampled_from(
            [
                (lambda x, w: x @ w, [(i, o)]),
                (lambda x, w: x @ w.T, [(o, i)]),
                (lambda x, w: F.linear(x, w.transpose(0, 1)), [(i, o)]),
                (lambda x, w: F.linear(x, w[:o]), [(o + 2, i)]),
                (lambda x, w: F.linear(x, w.view(i, o).mT), [(i * o,)]),
                (lambda x, w: F.linear(x, -w[..., 0]), [(o, i, 1)]),
                (lambda x, w, v: x @ torch.cat([w, v], 1), [(i, o), (i, 2)]),
                (lambda x, w, v: F.linear(x, w + 2.0 * (v.t() @ v).mean() * w), [(o, i), (2, 2)]),
                (lambda x, a, b, w: F.linear(x, w + b @ a), [(2, i), (o, 2), (o, i)]),
                (lambda x, w, b: F.linear(x, w, torch.cat([b, torch.zeros(1), b])), [(5, i), (2,)]),
                (lambda x, w: sum(F.linear(x, part) for part in w.chunk(2)), [(2 * o, i)]),
                (lambda x, w: F.linear(x.transpose(1, -1), w) if x.ndim > 2 else F.linear(x, w), [(o, i)]),
            ]
        )
    )
    sample = (*axes, i)
    layer = Function(how, *shapes)
    try:
        layer(torch.zeros(1, *sample))
    except RuntimeError:  # the axis exchanged for the last one must be as long
        sample = (i, *axes[1:], i)
    return measured(draw, layer, *sample)


@st.composite
def convolution(draw):
    """Convolutions with every padding there is."""
    seed(draw)
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(size(1, 3 if dims < 3 else 2)) for _ in range(dims))
    dilation = tuple(draw(size(1, 2)) for _ in range(dims))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = 1 if padding == "same" else tuple(draw(size(1, 2)) for _ in range(dims))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    groups = draw(st.sampled_from([1, 2]))
    layer = CONVOLUTIONS[dims](
        2,
        groups * draw(size(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    )
    return measured(draw, layer, 2, *(draw(size(5, 6)) for _ in range(dims)))


@st.composite
def asymmetric_convolution(draw):
    """Different padding on every side, positions folded into the batch."""
    seed(draw)
    left, right, top, bottom = (draw(st.integers(0, 2)) for _ in range(4))
    if draw(st.booleans()):
        pad = nn.ZeroPad2d((left, right, top, bottom))
        layer = nn.Sequential(pad, nn.Conv2d(2, 2, (2, 3), stride=draw(size(1, 2)), bias=draw(st.booleans())))
        return measured(draw, layer, 2, 4, 5)
    function = lambda x, w, b: F.conv2d(x.flatten(0, 1)[:, None], w, b).unflatten(0, (-1, 3))  # noqa: E731
    return measured(draw, Function(function, (2, 1, 2, 2), (2,)), 3, 3, 4)


@st.composite
def transposed_convolution(draw):
    """Transposed convolutions with stride, padding, output padding, groups, dilation."""
    seed(draw)
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(size(1, 3 if dims < 3 else 2)) for _ in range(dims))
    stride, dilation = (tuple(draw(size(1, 3 if dims < 3 else 2)) for _ in range(dims)) for _ in range(2))
    padding = tuple(draw(st.integers(0, min(1, d * (k - 1)))) for d, k in zip(dilation, kernel, strict=True))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    groups = draw(st.sampled_from([1, 2]))
    channels, outputs = groups * draw(size(1, 2)), groups * draw(size(1, 2))
    layer = TRANSPOSED[dims](
        channels, outputs, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation
    )
    return measured(draw, layer, channels, *(draw(size(2, 4 if dims < 3 else 2)) for _ in range(dims)))


@st.composite
def element_wise(draw):
    """Parameters in sums, products, quotients, powers, slopes; of any shape that broadcasts."""
    seed(draw)
    c, h, w = draw(size(1, 3)), draw(size(1, 3)), draw(size(2, 3))
    shapes = [(), (1,), (w,), (1, w), (h, 1), (h, w), (c, 1, 1), (1, c, 1, 1), (c, h, w), (1, 1, 1, w)]
    shape = draw(st.sampled_from(shapes))
    function, count = draw(
        st.sampled_from(
            [
                (lambda x, p: x + p, 1),
                (lambda x, p: p + x, 1),
                (lambda x, p: torch.add(x, p, alpha=-0.7), 1),
                (lambda x, p: torch.add(p, x, alpha=0.3), 1),
                (lambda x, p: x - p, 1),
                (lambda x, p: torch.sub(x, p, alpha=3), 1),
                (lambda x, p: torch.rsub(x, p, alpha=3), 1),
                (lambda x, p: torch.rsub(p, x, alpha=3), 1),
                (lambda x, p: x * p, 1),
                (lambda x, p: p * x.abs(), 1),
                (lambda x, p: x / (3.0 + p.abs()), 1),
                (lambda x, p: x / p, 1),
                (lambda x, p: p / (1.0 + x.square()), 1),
                (lambda x, p: x * p.exp(), 1),
                (lambda x, p: x * (2.0 * p - 1.0), 1),
                (lambda x, p: x + p.expand(len(x), c, h, w), 1),
                (lambda x, p: x + (0.5 * p).expand(len(x), c, h, w) * x, 1),
                (lambda x, p: x.abs().pow(p), 1),
                (lambda x, p: x.clamp(min=0.0).pow(p.abs()), 1),
                (lambda x, p: torch.lerp(x, x.sin(), p.expand(x.shape)), 1),
                (lambda x, p: torch.where(x > 0, p, x), 1),
                (lambda x, p: torch.where(x > 0, x.sin(), p), 1),
                (lambda x, p: (x - p) * p, 1),
                (lambda x, p: torch.sub(p, x * p, alpha=3), 1),
                (lambda x, p: torch.rsub(p, x, alpha=2) / p, 1),
                (lambda x, p: p / (1.0 + x.square()) - torch.lerp(x, -x, p.expand(x.shape)), 1),
                (lambda x, p: torch.where(x > 0, p, -p) * x - p, 1),
                (lambda x, p, q: torch.addcmul(q, x, p, value=2.0), 2),
                (lambda x, p, q: torch.addcmul(x, q, x.sin(), value=0.5) + p, 2),
                (lambda x, p, q: x + F.softmax(torch.stack([p, q]), 0)[0] * x, 2),
            ]
        )
    )
    return measured(draw, Function(function, *[shape] * count), c, h, w)


@st.composite
def slopes_and_scales(draw):
    """PReLU, layer scale after a reshape, class tokens, tokens for masked places."""
    seed(draw)
    c, w = draw(size(1, 3)), draw(size(1, 3))
    layer = draw(
        st.sampled_from(
            [
                nn.PReLU(),
                nn.PReLU(c),
                Function(lambda x, s: F.prelu(F.prelu(x, s) - x, s), (c,)),
                Function(lambda x, g: x * g.reshape(1, -1, 1), (c,)),
                Function(lambda x, t: torch.cat([t.expand(len(x), -1, -1), x], 1), (1, 2, w)),
                Function(lambda x, t: torch.cat([t.repeat(len(x), 1, 1), x], 1), (1, 1, w)),
                Function(lambda x, t: torch.cat([x, t.repeat(len(x), 2, 1)], 1), (2, w)),
                Function(lambda x, t: torch.cat([x, t.repeat(2 * len(x), 1).view(len(x), 2, w)], 1), (w,)),
                Function(lambda x, t: torch.cat([t.expand(len(x), 1, w), x], 1) + t, (1, 1, w)),
                Function(lambda x, t: x.transpose(0, 1).add(t).transpose(0, 1), (c, 1, w)),
                Function(lambda x, t: torch.cat([x.mT, t.repeat(1, len(x), 1).transpose(0, 1).mT], 2), (2, 1, w)),
            ]
        )
    )
    return measured(draw, layer, c, w)


@st.composite
def normaliser(draw):
    """Batch, layer, group and RMS norms, fused or written out."""
    seed(draw)
    c, h, w = 2 * draw(size(1, 2)), draw(size(1, 3)), draw(size(2, 3))
    layer = draw(
        st.sampled_from(
            [
                nn.BatchNorm2d(c),
                nn.GroupNorm(2, c, eps=0.1),
                nn.GroupNorm(1, c),
                nn.LayerNorm(w),
                nn.LayerNorm((h, w), eps=0.3),
                nn.LayerNorm((c, h, w)),
                nn.LayerNorm(w, bias=False),
                nn.RMSNorm(w),
                nn.RMSNorm((h, w), eps=0.2),
                nn.Sequential(nn.LocalResponseNorm(2, 1.0), nn.Conv2d(c, 2, 1)),
                Function(lambda x, g: x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * g, (w,)),
                Function(lambda x, g, b: F.layer_norm(x.transpose(0, 1), (w,), g, b).transpose(0, 1), (w,), (w,)),
            ]
        )
    )
    return measured(draw, layer, c, h, w)


@st.composite
def instance_norm(draw):
    """Instance norms, with and without parameters and running statistics."""
    seed(draw)
    dims, c = draw(st.integers(1, 3)), draw(size(1, 3))
    layer = nn.Sequential(
        CONVOLUTIONS[dims](c, c, 1),
        INSTANCE_NORMS[dims](c, affine=draw(st.booleans()), track_running_stats=draw(st.booleans())),
    )
    return measured(draw, layer, c, *(draw(size(2, 3)) for _ in range(dims)))


@st.composite
def derived_weight(draw):
    """Weights under a parametrisation: normalised, standardised, orthogonal."""
    seed(draw)
    i, o = draw(size(1, 3)), draw(size(2, 3))
    parametrizations, old = nn.utils.parametrizations, nn.utils
    kernel = {"kernel_size": 2, "bias": draw(st.booleans())}
    make = draw(
        st.sampled_from(
            [
                lambda: parametrizations.weight_norm(nn.Conv1d(i, o, **kernel)),
                lambda: parametrizations.weight_norm(nn.Conv1d(i, o, **kernel), dim=None),
                lambda: parametrizations.spectral_norm(nn.Conv1d(i, o, **kernel)),
                lambda: old.spectral_norm(nn.Conv1d(i, o, **kernel)),
                lambda: nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(4 * i, o))),
                lambda: nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(4 * i, o))),
                lambda: Function(standardised, (o, i, 2), (o,), (o,)),
                lambda: Function(lambda x, w: F.conv1d(x, w.unsqueeze(-1)), (o, i)),
                lambda: Function(lambda x, w: F.conv1d(x, w - w.mean((1, 2), keepdim=True)), (o, i, 2)),
                lambda: Function(lambda x, w: F.conv1d(x, w.permute(2, 0, 1).flip(0)), (i, 2, o)),
            ]
        )
    )
    return measured(draw, make(), i, 4)


def standardised(x, w, gain, b):
    """A convolution whose kernel is standardised by a batch norm of parameters alone."""
    kernel = F.batch_norm(w.reshape(1, len(w), -1), None, None, weight=0.7 * gain, training=True, momentum=0.0)
    return F.conv1d(x, kernel.reshape_as(w), b)


@st.composite
def embedding(draw):
    """Tables whose rows are taken several times by one sample, or not at all."""
    seed(draw)
    rows, width, tokens = draw(size(1, 4)), draw(size(1, 3)), draw(size(1, 4))
    padding = draw(st.sampled_from([None, 0, -1]))
    layer = draw(
        st.sampled_from(
            [
                nn.Embedding(rows, width, padding_idx=padding),
                Function(lambda i, t: F.embedding(i, t), (rows, width)),
                Function(lambda i, t: t[i], (rows, width)),
                Function(lambda i, t: t[i], (rows, 2, width)),
                Function(lambda i, t: t[i], (rows,)),
                Function(lambda i, t: t[-1 - i], (rows, width)),
                Function(lambda i, t: t.index_select(0, i.flatten()).unflatten(0, i.shape), (rows, width)),
                Function(lambda i, t: F.embedding(i.T, t).transpose(0, 1), (rows, width)),
                Function(lambda i, t: F.embedding(i, 2.0 * t.t()), (width, rows)),
            ]
        )
    )
    x = torch.randint(0, rows, (draw(st.integers(1, 4)), tokens))
    if draw(st.booleans()):
        layer = nn.Sequential(layer, Function(lambda x, p: x + p[:1], (2,)))
    return Measured(layer, x, scaled=False).eval(), x


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself or with a projection of it."""

    def __init__(self, attention, weights, memory=None) -> None:
        super().__init__()
        self.attention, self.weights, self.memory = attention, weights, memory

    def forward(self, x):
        y = x if self.attention.batch_first else x.transpose(0, 1)
        memory = y if self.memory is None else self.memory(y)
        out = self.attention(y, memory, memory, need_weights=self.weights)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)


@st.composite
def attention(draw):
    """``nn.MultiheadAttention`` with its options, and encoder layers."""
    seed(draw)
    first, bias = draw(st.booleans()), draw(st.booleans())
    width, tokens = 4, draw(size(1, 3))
    what = draw(st.sampled_from(["self", "keys", "memory", "encoder", "norm first"]))
    if what in ("encoder", "norm first"):
        layer = nn.TransformerEncoderLayer(
            width, 2, 3, activation=draw(st.sampled_from(["relu", "gelu"])), norm_first=what == "norm first",
            batch_first=first, bias=bias,
        )  # fmt: skip
        if not first:
            layer = nn.Sequential(Exchanged(), layer, Exchanged())
        return measured(draw, layer, tokens, width)
    more = draw(st.booleans())
    attention = nn.MultiheadAttention(
        width, draw(st.sampled_from([1, 2])), bias=bias, batch_first=first, add_bias_kv=more, add_zero_attn=more,
        kdim=3 if what == "memory" else None, vdim=3 if what == "memory" else None,
    )  # fmt: skip
    memory = {"self": None, "keys": nn.Linear(width, width), "memory": nn.Linear(width, 3)}[what]
    return measured(draw, SelfAttention(attention, draw(st.booleans()), memory), tokens, width)


class Exchanged(nn.Module):
    """The first two axes exchanged."""

    def forward(self, x):
        return x.transpose(0, 1)


class SharedLayers(nn.Module):
    """Tied tensors and modules called several times."""

    def __init__(self, width, vocabulary, calls) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.conv, self.norm = nn.Conv1d(width, width, 3, padding=1), nn.LayerNorm(width)
        self.calls = calls

    def forward(self, x):
        h = self.table(x)
        for _ in range(self.calls):
            h = self.norm(F.relu(self.mix(h)) + self.conv(h.mT).mT)
        return F.linear(h, self.table.weight)


@st.composite
def shared(draw):
    """An embedding tied with the output, layers called in a loop."""
    seed(draw)
    rows = draw(size(2, 4))
    x = torch.randint(0, rows, (draw(st.integers(1, 3)), draw(size(1, 3))))
    layer = settled(SharedLayers(draw(size(3, 4)), rows, draw(size(1, 2))))
    return Measured(layer, x, scaled=False).eval(), x


@st.composite
def grouped_linear(draw):
    """One matrix per group."""
    seed(draw)
    g, i, o = draw(size(1, 3)), draw(size(1, 3)), draw(size(1, 3))
    function = draw(
        st.sampled_from(
            [
                lambda x, w: torch.einsum("ngi,gio->ngo", x, w),
                lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1),
            ]
        )
    )
    return measured(draw, Function(function, (g, i, o)), g, i)


class FirstOfSequence(nn.Module):
    """A recurrent network's outputs at the first step."""

    def __init__(self, recurrent) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x):
        return self.recurrent(x)[0][:, 0]


@st.composite
def recurrent(draw):
    """Recurrent networks, whose parameters are used once per step."""
    seed(draw)
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    layer = kind(2, 2, num_layers=draw(size(1, 2)), bidirectional=True, batch_first=True, bias=draw(st.booleans()))
    return measured(draw, FirstOfSequence(layer), draw(size(1, 3)), 2)


# Every strategy whose parameters all have rules.
RULED = {
    "linear": linear,
    "functional linear": functional_linear,
    "convolution": convolution,
    "asymmetric convolution": asymmetric_convolution,
    "transposed convolution": transposed_convolution,
    "element-wise": element_wise,
    "slopes and scales": slopes_and_scales,
    "normaliser": normaliser,
    "instance norm": instance_norm,
    "derived weight": derived_weight,
    "embedding": embedding,
    "attention": attention,
    "shared": shared,
    "grouped linear": grouped_linear,
    "recurrent": recurrent,
}
