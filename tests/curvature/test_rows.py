"""What is proved of where the samples lie is so: only a sample's own block reaches its logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ms_optim.curvature import hessian_trace
from ms_optim.curvature.graph.backprop import deltas
from ms_optim.curvature.graph.rows import proved_layouts
from ms_optim.curvature.graph.tape import operation, read_tape
from ms_optim.reference import curvature as oracle

N = 3  # samples; other axes are often as long, so that lengths alone say nothing

# Shape-preserving or not, mixing or not: functions of a tensor of any shape with three or four axes.
STEPS = {
    "relu": F.relu,
    "scale by the last axis": lambda x: x * torch.rand(x.shape[-1]),
    "add a constant of one axis less": lambda x: x + torch.rand(x.shape[1:]),
    "add its mean over the samples": lambda x: x + x.mean(0, keepdim=True),
    "add its sum over an axis, which comes to lie elsewhere": lambda x: x + x.sum(1) if len(set(x.shape)) == 1 else x,
    "add its mean over an axis": lambda x: x + x.mean(1, keepdim=True),
    "softmax, last": lambda x: x.softmax(-1),
    "softmax, first": lambda x: x.softmax(0),
    "cumulative, first": lambda x: x.cumsum(0),
    "cumulative, second": lambda x: x.cumsum(1),
    "flip, first": lambda x: x.flip(0),
    "flip, last": lambda x: x.flip(-1),
    "roll over all": lambda x: x.roll(1),
    "roll, second": lambda x: x.roll(1, 1),
    "first two exchanged": lambda x: x.transpose(0, 1),
    "last two exchanged": lambda x: x.transpose(-1, -2),
    "axes rotated": lambda x: x.movedim(0, -1),
    "permuted to the front": lambda x: x.movedim(-1, 0),
    "linear": lambda x: F.linear(x, torch.rand(3, x.shape[-1])),
    "normalised, last": lambda x: F.layer_norm(x, x.shape[-1:]),
    "normalised, all": lambda x: F.layer_norm(x, x.shape),
    "first two folded and a new one": lambda x: x.reshape(-1, 1, *x.shape[2:]),
    "split in three, stacked in front": lambda x: torch.stack(x.split(1, -1) if x.shape[-1] == 3 else [x] * 3)[1],
    "a piece before": lambda x: torch.stack([x, 2 * x], 1).unbind(1)[1],
    "a stack in front, summed": lambda x: torch.stack([x, 2 * x]).sum(0),
    "a stack in front, its axis moved": lambda x: torch.stack([x, 2 * x, -x]).transpose(0, 1).unbind(1)[2],
    "padded, last": lambda x: F.pad(x, (1, 0)),
    "padded, first": lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (1, 2)),
    "cat, last": lambda x: torch.cat([x, x.relu()], -1),
    "cat, first": lambda x: torch.cat([x, x.relu()], 0),
    "sliced, second": lambda x: x[:, :1],
    "batched product": lambda x: x @ x.transpose(-1, -2),
    "convolved": lambda x: F.conv1d(x, torch.rand(2, x.shape[1], 1)) if x.ndim == 3 else x,
    "convolved by itself": lambda x: F.conv1d(x, x[:2, :, :1]) if x.ndim == 3 else x,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x) if x.ndim == 4 else x,
    "four axes": lambda x: x.unflatten(-1, (1, -1)) if x.ndim == 3 else x,
    "three axes": lambda x: x.flatten(1, 2) if x.ndim == 4 else x,
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_only_a_samples_own_block_reaches_its_logits(names, seed):
    torch.manual_seed(seed)
    x = torch.randn(N, 3, 3, requires_grad=True) * 1.0
    for name in names:
        x = STEPS[name](x)
        if x.numel() > 3000:
            break
    if x.numel() % N:
        x = torch.cat([x.flatten(), x.new_zeros(-x.numel() % N)])
    logits = x.reshape(N, -1) * 1.0
    proved = proved_layouts(read_tape(logits, {}).order, tuple(logits.shape))
    nodes = [node for node in proved if node is not logits.grad_fn and operation(node) != "AccumulateGrad"]
    for n in range(N):
        column = torch.zeros_like(logits)
        column[n] = torch.rand(logits.shape[1]) + 0.5
        if not nodes:
            return
        for node, delta in zip(nodes, deltas(logits, nodes, column[None]), strict=True):
            others = torch.arange(N) != n
            assert not bool(proved[node].front(delta[0])[others].any()), (operation(node), proved[node])


class _Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(4, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.embed(x)
        x = self.block(x if self.batch_first else x.transpose(0, 1))
        return self.head(x.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("length", [N, 5])
@pytest.mark.parametrize("batch_first", [True, False])
def test_every_use_in_a_transformer_is_proved(batch_first, length):
    model = _Encoder(batch_first)
    tape = read_tape(model(torch.randn(N, length, 4)), dict(model.named_parameters()))
    orders = {tape.layouts[use.node].order for uses in tape.uses.values() for use in uses}
    assert "position-major" in orders  # attention puts the sequence first, whatever it is given


NEWER = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 records other operations"
)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mixer_s32_224",
        pytest.param("vit_tiny_patch16_224", marks=NEWER),
        pytest.param("swin_tiny_patch4_window7_224", marks=NEWER),
    ],
)
def test_every_use_in_timms_networks_is_proved(name):
    timm = pytest.importorskip("timm")
    size = {"img_size": 32, "window_size": 2, "depths": (1, 1, 1, 1)} if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=5, **size).eval()
    side = 32 if name in ("resnet18", "swin_tiny_patch4_window7_224") else 224
    tape = read_tape(model(torch.randn(2, 3, side, side)), dict(model.named_parameters()))
    assert all(use.node in tape.layouts for uses in tape.uses.values() for use in uses)


class _Later(nn.Module):
    """Logits that are the second output of an operation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x):
        return torch.cat([x.new_zeros(1, 3), self.body(x)]).split([1, len(x)])[1]


class _NoTokens(nn.Module):
    """An optional group of tokens, of which there are none."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.embed(x[:, None].expand(-1, 5, -1))
        return self.head(tokens.mean(1)) + F.pad(tokens[:, :0].mean(2), (0, 3))


@pytest.mark.parametrize("model", [_Later, _NoTokens])
def test_odd_ends_are_exact(model):
    torch.manual_seed(0)
    model, x = model(), torch.randn(4, 4)
    assert dict(hessian_trace(model, x)) == pytest.approx(oracle.gauss_newton_traces(model, x), rel=1e-10)


def test_what_two_ways_disagree_about_is_doubtful():
    w = nn.Parameter(torch.randn(N, N))
    x = torch.randn(N, N, requires_grad=True)
    hidden = x @ w
    tape = read_tape(hidden + hidden.t(), {"w": w})  # rows are samples for one term, columns for the other
    assert hidden.grad_fn not in tape.layouts
