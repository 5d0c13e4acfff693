r"""Who is measured: ours, the peers, and the pass that all are measured in.

An *estimator* is made for one model and one batch and takes a number of probes; it returns the trace of every
parameter's block, or of the whole matrix under the one name ``"total"`` where a peer offers no more.  What each call
must do to get from the model to the numbers is inside it, the forward pass included.

* **Ours**: :func:`ms_optim.hessian_trace`, all columns of the factor of P, or ``columns=r``.
* **BackPACK**: ``DiagGGNExact`` and ``DiagGGNMC`` hold the diagonal of the Gauss-Newton matrix, whose sum per parameter
  is the same trace.  What is not an ``nn.Sequential`` goes through its own converter (``use_converter=True``).
* **curvlinops**: Hutchinson's estimator, Hutch++ and XTrace on its Gauss-Newton operator give the trace of the *whole*
  matrix.  Per layer there are two ways: split vᵀ(Gv) of the whole operator by parameter (Hutchinson only, no further
  product), or one operator for each parameter (all three).
* **The floor**: one forward pass and K − 1 backpropagations to the output of the first layer with parameters, column by
  column or all in one call: no method that backpropagates columns can do with less.
* **PyHessian**: Hutchinson's estimator on the *full* Hessian, of the whole network; per layer, its products split by
  parameter.

Peers are imported where they are used: whoever has none can still measure the rest.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ms_optim

from .harness import Run, failure, paired
from .memory import lift, peak_above
from .networks import Problem, problem

Traces = Mapping[str, Any]
Estimator = Callable[[int], Traces]

PASS = "forward + backward"
EXACT = "exact"
SAMPLED = "columns=2"
BACKPACK = "BackPACK DiagGGNExact"
BACKPACK_MC = "BackPACK DiagGGNMC"
HUTCHINSON = "curvlinops Hutchinson"
HUTCHPP = "curvlinops Hutch++"
XTRACE = "curvlinops XTrace"
PYHESSIAN = "PyHessian"
LOOPED = "floor, column by column"
BATCHED = "floor, all columns at once"
BY_LAYER = ", by layer"


@dataclass(frozen=True)
class Contender:
    """Somebody to measure.

    Attributes:
        make: Model, images, labels → estimator.
        step: The smallest number of probes, of which others are multiples.
    """

    make: Callable[[nn.Module, Tensor, Tensor], Estimator]
    step: int = 1


def training_pass(model: nn.Module, x: Tensor, y: Tensor) -> Estimator:
    """One forward and backward pass of the training loss.

    Args:
        model: The model.
        x: Images.
        y: Labels.

    Returns:
        What does it; it has no trace to return.
    """

    def run(probes: int = 1) -> Traces:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        return {}

    return run


def ours(columns: int | None) -> Callable[[nn.Module, Tensor, Tensor], Estimator]:
    """:func:`ms_optim.hessian_trace`; the probes of ``columns=r`` differ from call to call.

    Args:
        columns: r, or ``None`` for the exact trace.

    Returns:
        The maker.
    """

    def make(model: nn.Module, x: Tensor, y: Tensor) -> Estimator:
        signs = torch.Generator().manual_seed(0)
        return lambda probes=1: ms_optim.hessian_trace(model, x, columns=columns, generator=signs)

    return make


def floor(batched: bool) -> Callable[[nn.Module, Tensor, Tensor], Estimator]:
    """One forward pass and K − 1 backpropagations to the first activation, without gradients of weights.

    Args:
        batched: All columns in one call, instead of one after the other.

    Returns:
        The maker; what it makes has no trace to return.
    """

    def make(model: nn.Module, x: Tensor, y: Tensor) -> Estimator:
        first = next(module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        columns = torch.randn(classes - 1, len(x), classes, device=x.device, dtype=x.dtype)

        def run(probes: int = 1) -> Traces:
            outputs: list[Tensor] = []
            handle = first.register_forward_hook(lambda module, args, output: outputs.append(output))
            logits = model(x)
            handle.remove()
            if batched:
                torch.autograd.grad(logits, outputs, columns, is_grads_batched=True)
            else:
                for column in columns:
                    torch.autograd.grad(logits, outputs, column, retain_graph=True)
            return {}

        return run

    return make


def backpack_diagonal(samples: bool = False) -> Callable[[nn.Module, Tensor, Tensor], Estimator]:
    """BackPACK's Gauss-Newton diagonal, summed.

    Args:
        samples: Its Monte-Carlo form.

    Returns:
        The maker, which works on a copy of the model.
    """

    def make(model: nn.Module, x: Tensor, y: Tensor) -> Estimator:
        from backpack import backpack, extend  # type: ignore[import-not-found, unused-ignore]
        from backpack.extensions import DiagGGNExact, DiagGGNMC  # type: ignore[import-not-found, unused-ignore]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            extended = extend(copy.deepcopy(model), use_converter=not isinstance(model, nn.Sequential))
        criterion = extend(nn.CrossEntropyLoss())
        field = "diag_ggn_mc" if samples else "diag_ggn_exact"

        def run(probes: int = 1) -> Traces:
            extended.zero_grad()
            with warnings.catch_warnings(), backpack(DiagGGNMC(mc_samples=probes) if samples else DiagGGNExact()):
                warnings.simplefilter("ignore")  # its hooks fire at modules whose inputs need no gradient
                criterion(extended(x), y).backward()
            traces = {}
            for name, parameter in extended.named_parameters():
                traces[name] = getattr(parameter, field).sum()
                delattr(parameter, field)
            return traces

        return run

    return make


def curvlinops_trace(estimator: str, by_layer: bool) -> Callable[[nn.Module, Tensor, Tensor], Estimator]:
    """One of curvlinops' estimators on its Gauss-Newton operator.

    Args:
        estimator: The name of its function.
        by_layer: One operator for each parameter, instead of one for all.

    Returns:
        The maker.
    """

    def make(model: nn.Module, x: Tensor, y: Tensor) -> Estimator:
        import curvlinops  # type: ignore[import-not-found, unused-ignore]

        estimate = getattr(curvlinops, estimator)
        operators = _operators(curvlinops.GGNLinearOperator, model, x, y, by_layer)

        def run(probes: int = 1) -> Traces:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                return {name: estimate(operator, probes) for name, operator in operators.items()}

        return run

    return make


def curvlinops_split(model: nn.Module, x: Tensor, y: Tensor) -> Estimator:
    """Hutchinson's estimator with curvlinops' products of the whole Gauss-Newton matrix, split by parameter.

    Args:
        model: The model.
        x: Images.
        y: Labels.

    Returns:
        The estimator, v ∘ Gv summed within each parameter.
    """
    import curvlinops  # type: ignore[import-not-found, unused-ignore]

    (operator,) = _operators(curvlinops.GGNLinearOperator, model, x, y, by_layer=False).values()
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def run(probes: int = 1) -> Traces:
        v = torch.randint(0, 2, (sum(sizes.values()), probes), device=x.device).to(x.dtype) * 2 - 1
        with sdpa_kernel(SDPBackend.MATH):
            parts = (v * (operator @ v)).sum(1).split(list(sizes.values()))
        return {name: part.sum() / probes for name, part in zip(sizes, parts, strict=True)}

    return run


def _operators(kind: Any, model: nn.Module, x: Tensor, y: Tensor, by_layer: bool) -> dict[str, Any]:
    """Name → operator; the check of determinism, which costs products of its own, is left out."""
    named = dict(model.named_parameters())
    groups = {name: [p] for name, p in named.items()} if by_layer else {"total": list(named.values())}
    return {
        name: kind(model, nn.CrossEntropyLoss(), group, [(x, y)], check_deterministic=False, num_data=len(x))
        for name, group in groups.items()
    }


def pyhessian_trace(split: bool) -> Callable[[nn.Module, Tensor, Tensor], Estimator]:
    """PyHessian's Hutchinson estimator on the full Hessian.

    Args:
        split: Its products, split by parameter, instead of its own ``trace``.

    Returns:
        The maker.
    """

    def make(model: nn.Module, x: Tensor, y: Tensor) -> Estimator:
        from pyhessian import hessian  # type: ignore[import-not-found, unused-ignore]
        from pyhessian.utils import hessian_vector_product  # type: ignore[import-not-found, unused-ignore]

        names = [name for name, _ in model.named_parameters()]

        def run(probes: int = 1) -> Traces:
            model.zero_grad(set_to_none=True)
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                warnings.simplefilter("ignore")  # backward(create_graph=True) leaves a cycle, cut below
                found = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=x.is_cuda)
            try:
                if not split:
                    values = found.trace(maxIter=probes, tol=-1.0)  # no early end: probes means probes
                    return {"total": sum(values) / len(values)}
                totals = dict.fromkeys(names, 0.0)
                for _ in range(probes):
                    v = [torch.randint_like(p, 2) * 2 - 1 for p in found.params]
                    products = hessian_vector_product(found.gradsH, found.params, v)
                    for name, direction, product in zip(names, v, products, strict=True):
                        totals[name] += float((direction * product).sum()) / probes
                return totals
            finally:
                model.zero_grad(set_to_none=True)

        return run

    return make


CONTENDERS: dict[str, Contender] = {
    PASS: Contender(training_pass),
    EXACT: Contender(ours(None)),
    SAMPLED: Contender(ours(2)),
    BACKPACK: Contender(backpack_diagonal()),
    BACKPACK_MC: Contender(backpack_diagonal(samples=True)),
    HUTCHINSON: Contender(curvlinops_trace("hutchinson_trace", by_layer=False)),
    HUTCHPP: Contender(curvlinops_trace("hutchpp_trace", by_layer=False), step=3),
    XTRACE: Contender(curvlinops_trace("xtrace", by_layer=False), step=2),
    PYHESSIAN: Contender(pyhessian_trace(split=False)),
    LOOPED: Contender(floor(batched=False)),
    BATCHED: Contender(floor(batched=True)),
    HUTCHINSON + BY_LAYER: Contender(curvlinops_split),
    HUTCHPP + BY_LAYER: Contender(curvlinops_trace("hutchpp_trace", by_layer=True), step=3),
    XTRACE + BY_LAYER: Contender(curvlinops_trace("xtrace", by_layer=True), step=2),
    PYHESSIAN + BY_LAYER: Contender(pyhessian_trace(split=True)),
}


def estimator(which: str, of: Problem) -> Callable[[], object]:
    """A contender with its smallest number of probes.

    Args:
        which: Of :data:`CONTENDERS`.
        of: Model, images, labels.

    Returns:
        What is timed.
    """
    contender = CONTENDERS[which]
    estimate = contender.make(*of)
    return lambda: estimate(contender.step)


def prepared(
    which: str, name: str, full: bool, threads: int, device: str, classes: int = 10, batch: int | None = None
) -> Callable[[], object]:
    """A contender in a process of its own, whose imports and first allocations one tiny call has paid for.

    Args:
        which: Of :data:`CONTENDERS`.
        name: Of :data:`~benchmarks.networks.NETWORKS`.
        full: The network itself, or its stand-in.
        threads: The number of torch's threads.
        device: Where it runs.
        classes: K.
        batch: The number of images.

    Returns:
        What is measured.
    """
    torch.set_num_threads(threads)
    with contextlib.suppress(Exception):  # whoever cannot do the stand-in will say so with the network itself
        estimator(which, problem(name, False, device))()
    return estimator(which, problem(name, full, device, classes, batch))


def side_by_side(
    network: str,
    which: Sequence[str],
    full: bool,
    device: str,
    rounds: int,
    budget: float,
    peaks: int = 1,
    label: str | None = None,
    classes: int = 10,
    batch: int | None = None,
    slow: Mapping[str, int] | None = None,
    warm: int = 2,
) -> list[Run]:
    """Time contenders in paired rounds, then the peak of memory of each in processes of their own.

    Args:
        network: Of :data:`~benchmarks.networks.NETWORKS`.
        which: Of :data:`CONTENDERS`.
        full: The network itself, or its stand-in, whose peaks are taken in this process.
        device: Where they run.
        rounds: The number of rounds.
        budget: Seconds after which no further round begins, as in :func:`~benchmarks.harness.paired`.
        peaks: The number of processes for each peak of memory.
        label: What to call the network in the lines; by default its name.
        classes: K.
        batch: The number of images.
        slow: As in :func:`~benchmarks.harness.paired`.
        warm: As there.

    Returns:
        The lines; one with ``failed`` for a contender that cannot do it.
    """
    label = label or network
    runs: list[Run] = []
    able: dict[str, Callable[[], object]] = {}
    of = problem(network, full, device, classes, batch)
    for name in which:
        try:
            able[name] = estimator(name, of)
        except Exception as error:  # noqa: BLE001 - a peer that fails is a result, and says how
            runs.append(failure(label, name, error))
    runs += paired(label, able, rounds, slow=slow, budget=budget, device=device, warm=warm)
    failed = {run["contender"] for run in runs if "failed" in run}
    for name in able:
        for index in range(peaks if name not in failed else 0):
            arguments = (name, network, full, torch.get_num_threads(), device, classes, batch)
            if full:
                found = peak_above(prepared, *arguments, device=device)
            else:  # a trial; seconds for a new process would be most of it
                found = dict(zip(("peak_bytes", "method"), lift(able[name], device), strict=True))
            runs.append({"network": label, "contender": name, "round": index, **found})
    return runs
