r"""Two-layer networks on XOR data: outputs, traces, constructed minima, and steps compiled from ``two_layer.c``.

    no bias    W2 relu(W1 x)
    bias       W2 relu(W1 x + b1)
    Sim-BN     W2 SBN(relu(W1 x + b1)) ,     SBN(h_i)[j] = γ h_i[j] / √(mean_k h_k[j]²), over the training set
    Sim-LN     W2 h / max(‖h‖, 1e-6) ,       h = relu(W1 x + b1)

f is a number, and its loss is (f − y)², without ½.  With x' = (x, 1), u the input of W2 and 1 = [h > 0], the gradient
of one sample's f is closed-form:

    no bias, bias    ‖∂f/∂(W1, b1)‖² = ‖x'‖² Σ_j W2_j² 1_j ,     ‖∂f/∂W2‖² = ‖h‖²
    Sim-LN           ‖x'‖² Σ_j (W2_j − f u_j)² 1_j / ‖h‖² ,       1
    Sim-BN           row j, with s_j the root in SBN:  γ W2_j 1_j (x'_i / s_j − h_ij / (n s_j³) Σ_k h_kj x'_k)

and (2/n) Σ_i ‖∇f(x_i)‖² is the trace of the *Gauss-Newton* matrix.  Where every sample is fitted it is that of the
Hessian (Lemma 4.1); before that the Hessian has a second part, which is left out here at every step.

Source: Wen, Li, Ma, arXiv 2307.11007, sections 3 and 4 and eq. 5.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NO_BIAS, BIAS, SIM_BN, SIM_LN = "no bias", "bias", "Sim-BN", "Sim-LN"
KINDS = (NO_BIAS, BIAS, SIM_BN, SIM_LN)
EPS = 1e-6
_CODE = {NO_BIAS: 0, BIAS: 0, SIM_LN: 1, SIM_BN: 2}
_ROW = 32  # of two_layer.c
_UNITS = 64  # a multiple of its blocks


@dataclass
class Network:
    """A network, or a minimum that was constructed.

    Attributes:
        kind: Of :data:`KINDS`.
        first: (W1, b1), ``[m, d + 1]``; the last column stays 0 without a bias.
        second: W2, ``[m]``.
        gamma: γ of Sim-BN.
    """

    kind: str
    first: Tensor
    second: Tensor
    gamma: float = 1.0

    def extended(self, x: Tensor) -> Tensor:
        """x' = (x, 1), or (x, 0) without a bias, ``[n, d + 1]``."""
        last = torch.full((len(x), 1), 0.0 if self.kind == NO_BIAS else 1.0, dtype=x.dtype)
        return torch.cat([x, last], 1)

    def hidden(self, x: Tensor) -> Tensor:
        """h, ``[n, m]``."""
        return (self.extended(x) @ self.first.T).relu()

    def double(self) -> Network:
        """The same in float64, in which everything is measured."""
        return Network(self.kind, self.first.double(), self.second.double(), self.gamma)


def xor(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x uniform in {−1, 1}^d, y = x_1 x_2, in float64.

    Args:
        n: The number of samples.
        d: The dimension.
        generator: Draws them.

    Returns:
        x ``[n, d]``, y ``[n]``.
    """
    x = 2.0 * torch.randint(0, 2, (n, d), generator=generator).double() - 1
    return x, x[:, 0] * x[:, 1]


def initial(kind: str, m: int, d: int, generator: torch.Generator, shrink: float = 1.0) -> Network:
    """Weights as ``torch.nn.Linear`` draws them, uniform in ±1/√(fan-in), float32; γ = 1.

    Args:
        kind: Of :data:`KINDS`.
        m: The number of units.
        d: The dimension.
        generator: Draws them.
        shrink: What the first layer is divided by.

    Returns:
        The network.
    """
    first = (2 * torch.rand(m, d + 1, generator=generator) - 1) / math.sqrt(d) / shrink
    if kind == NO_BIAS:
        first[:, -1] = 0
    return Network(kind, first, (2 * torch.rand(m, generator=generator) - 1) / math.sqrt(m))


def _into_second(net: Network, x: Tensor, training: Tensor) -> Tensor:
    """The input of W2, ``[n, m]``; a unit that is dead on the whole training set stays 0 in Sim-BN."""
    h = net.hidden(x)
    if net.kind == SIM_LN:
        return h / h.norm(dim=1, keepdim=True).clamp_min(EPS)
    if net.kind == SIM_BN:
        root = net.hidden(training).square().mean(0).sqrt()
        return net.gamma * h / torch.where(root > 0, root, math.inf)
    return h


def outputs(net: Network, x: Tensor, training: Tensor) -> Tensor:
    """f(x).

    Args:
        net: The network.
        x: ``[n, d]``.
        training: The training inputs, whose statistics Sim-BN uses.

    Returns:
        ``[n]``.
    """
    return _into_second(net, x, training) @ net.second


def traces(net: Network, x: Tensor) -> dict[str, float]:
    """The Gauss-Newton trace of each layer, (2/n) Σ_i ‖∂f(x_i)/∂W_p‖², exactly.

    Args:
        net: The network.
        x: The training inputs, ``[n, d]``.

    Returns:
        ``"first"`` (W1 and b1), ``"second"`` (W2), and ``"gamma"`` for Sim-BN.
    """
    wide, h, u = net.extended(x), net.hidden(x), _into_second(net, x, x)
    active, f, q = (h > 0).to(x.dtype), u @ net.second, wide.square().sum(1)
    found = {"second": u.square().sum(1)}
    if net.kind == SIM_LN:
        found["first"] = q * (active * (net.second - f[:, None] * u).square()).sum(1)
        found["first"] = found["first"] / h.square().sum(1).clamp_min(EPS**2)
    elif net.kind == SIM_BN:
        n, root = len(x), h.square().mean(0).sqrt()
        root = torch.where(root > 0, root, math.inf)
        v = h.T @ wide
        rows = q[:, None] / root**2 - 2 * h * (wide @ v.T) / (n * root**4) + h**2 * v.square().sum(1) / (n**2 * root**6)
        found["first"] = (active * (net.gamma * net.second) ** 2 * rows).sum(1)
        found["gamma"] = (f / net.gamma).square()
    else:
        found["first"] = q * (active * net.second.square()).sum(1)
    return {name: 2 * float(squares.mean()) for name, squares in found.items()}


def minimum_sharpness(net: Network, x: Tensor) -> float:
    """The smallest trace among the equivalent networks; (W1, b1) in front of a normaliser at unit-norm rows.

    Args:
        net: The network.
        x: The training inputs.

    Returns:
        2 √(c_1 c_2) of the two layers, or of γ and W2, and with a normaliser c_1 ‖(W1, b1)‖² / 2m beside it.
    """
    c = traces(net, x)
    if net.kind in (NO_BIAS, BIAS):
        return 2 * math.sqrt(c["first"] * c["second"])
    pinned = c["first"] * float(net.first.square().sum()) / pinned_norm(net) ** 2
    return pinned + (2 * math.sqrt(c["gamma"] * c["second"]) if net.kind == SIM_BN else c["second"])


def pinned_norm(net: Network) -> float:
    """√(2m), the norm of (W1, b1) with unit-norm rows on average: m rows of W1 and m entries of b1."""
    return math.sqrt(2 * len(net.first))


def generalising(d: int, bias: bool) -> Network:
    """Four units that compute x_1 x_2 on the whole cube, at the smallest trace (eq. 5, r as the bound needs it).

    With a bias one unit, r (±x_1 ± x_2 − 1), is active at any x, with value r: f = ±1, ‖∇f‖² = (d + 1)/r² + r², and r =
    (d + 1)^{1/4} makes that 2√(d + 1).  Without, its value is 2 r: d/(4r²) + 4r², and 2 r = d^{1/4}.

    Args:
        d: The dimension.
        bias: Whether there is one.

    Returns:
        The network.
    """
    height = (d + 1) ** 0.25 if bias else d**0.25  # of the active unit
    first = torch.zeros(4, d + 1, dtype=torch.float64)
    first[:, :2] = torch.tensor([[1, 1], [-1, -1], [1, -1], [-1, 1]])
    first[:, -1] = -1.0 if bias else 0.0
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    return Network(BIAS if bias else NO_BIAS, first * height / (1 if bias else 2), signs / height)


def memorising(x: Tensor, y: Tensor) -> Network:
    """A unit for each training sample, r (x_i·x − d + 1), active there and nowhere else on the cube; r = (d + 1)^{1/4}.

    Args:
        x: The training inputs, all different.
        y: Their targets ±1.

    Returns:
        The network, with a bias: ‖∇f(x_i)‖² = 2√(d + 1), f = 0 elsewhere.
    """
    d, r = x.shape[1], (x.shape[1] + 1) ** 0.25
    return Network(BIAS, r * torch.cat([x, torch.full((len(x), 1), 1.0 - d, dtype=x.dtype)], 1), y / r)


def least_trace(d: int) -> float:
    """4√(d + 1): ‖∇f‖² ≥ 2√(d + 1)|f| for the network with a bias, and |f| = 1 where it fits (eq. 4)."""
    return 4 * math.sqrt(d + 1)


@functools.cache
def _library(real: str) -> ctypes.CDLL:
    """``two_layer.c`` for ``float`` or ``double``, compiled once in a process."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("the steps of benchmarks/two_layer.c need a C compiler (cc, gcc or clang) on the path")
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"two_layer_{real}.so"
        options = ["-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", f"-DREAL={real}"]
        subprocess.run([compiler, *options, str(source), "-o", str(out), "-lm"], check=True, capture_output=True)
        return ctypes.CDLL(str(out))  # stays loaded when the file is gone


@dataclass(frozen=True)
class Rule:
    """How a network is trained: the numbers of a step.

    Attributes:
        lr: The learning rate.
        strength: ρ of 1-SAM, or λ with ``trace``.
        decay: Weight decay, of full-batch steps.
        full: Full-batch gradient descent, instead of one sample a step.
        trace: The gradient of (f − y)² + λ · 2‖∇f‖², instead of 1-SAM's.
        every: Move to the balanced representative before every so many steps; 0: never.
        sample: Balance the traces of the step's sample, instead of those of the training set.
        radius: The norm that (W1, b1) moves to in Sim-LN and Sim-BN; 0: unit-norm rows.
    """

    lr: float
    strength: float = 0.0
    decay: float = 0.0
    full: bool = False
    trace: bool = False
    every: int = 0
    sample: bool = False
    radius: float = 0.0


def train(net: Network, x: Tensor, y: Tensor, rule: Rule, order: Tensor, begun: int = 0) -> None:
    """Take steps, in place, in the precision of the network's weights.

    Args:
        net: The network.
        x: The training inputs.
        y: Their targets.
        rule: The numbers of a step.
        order: The sample of each step; of full-batch steps only their number counts.
        begun: How many steps were taken before, for ``every``.
    """
    dtype = net.first.dtype
    library = _library("float" if dtype == torch.float32 else "double")
    m, dims = net.first.shape
    wide, y = net.extended(x).to(dtype).contiguous(), y.to(dtype).contiguous()
    order, steps = order.int().contiguous(), ctypes.c_long(len(order))
    radius = rule.radius or pinned_norm(net)
    gamma = torch.tensor([net.gamma], dtype=dtype)
    number = ctypes.c_double
    if not rule.full and net.kind != SIM_BN:
        units = -(-m // _UNITS) * _UNITS  # units of zeros stay zeros
        first = torch.zeros(dims, units, dtype=dtype)
        second = torch.zeros(units, dtype=dtype)
        first[:, :m], second[:m] = net.first.T, net.second
        sizes = (_CODE[net.kind], int(rule.trace), units, dims, len(x))
        every = (rule.every, int(not rule.sample), number(radius))
        arrays = (_at(first), _at(second), _at(wide), _at(y), _at(order))
        library.sample_steps(
            *sizes, *arrays, steps, ctypes.c_long(begun), number(rule.lr), number(rule.strength), *every
        )
        net.first, net.second = first[:, :m].T.contiguous(), second[:m].clone()
        return
    if dims > _ROW:
        raise ValueError(f"the input has {dims - 1} entries; two_layer.c has rows of {_ROW} with the bias")
    if rule.trace or (rule.every and rule.full):
        raise ValueError(f"{rule} of {net.kind} is not among the steps of two_layer.c")
    first, samples = torch.zeros(m, _ROW, dtype=dtype), torch.zeros(len(x), _ROW, dtype=dtype)
    first[:, :dims], samples[:, :dims] = net.first, wide
    second = net.second.clone().contiguous()
    weights = (_at(first), _at(second), _at(gamma), _at(samples), _at(y))
    if rule.full:
        library.batch_steps(_CODE[net.kind], m, len(x), *weights, steps, number(rule.lr), number(rule.decay))
    else:
        step = (number(rule.lr), number(rule.strength), rule.every, number(radius))
        library.bn_steps(m, len(x), *weights, _at(order), steps, ctypes.c_long(begun), *step)
    net.first, net.second, net.gamma = first[:, :dims].contiguous(), second, float(gamma)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
