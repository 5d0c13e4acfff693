r"""The measurement: one pass over the data in which every layer's exact or sampled curvature is summed.

Batches are taken as they come, split into chunks of samples that fit in the budget, and each chunk is one forward pass
(:mod:`~ms_optim.curvature.reading`) and some columns of S sent through its graph (:mod:`~ms_optim.curvature.scheme`).
What is learned from the first samples, where the samples lie in every tensor and how many of them fit, serves the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..batch import Batch, batches
from ..errors import CurvatureError, MemoryBudgetError, MsOptimError
from .budget import Chunk, default_budget, keep_pages, plan_chunk
from .evaluation import BatchStatistics, evaluation
from .parallel import ProcessGroup, agree_on_success, own_generator, sum_over_ranks
from .reading import Orders, Reading, finite_logits
from .request import Request, Totals
from .rules.contraction import wide
from .scheme import Scheme

# A batch of up to this many samples and bytes of inputs is not planned for unless a budget is given: reading one more
# graph would cost more than it saves.
_SMALL_SAMPLES = 48
_SMALL_BYTES = 2**20

# Plans of models measured before: repeated measurements, as an optimizer's, need not plan again. (Only speed and the
# peak of memory depend on them; with a budget of the caller's own, which has to hold, a plan is always made afresh.)
_PLANS: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Chunk]] = WeakKeyDictionary()


def measure(
    model: nn.Module,
    data: Any,
    parameters: Mapping[str, nn.Parameter],
    request: Request,
    finish: Callable[[Totals], Any],
    group: ProcessGroup | None = None,
) -> Totals:
    """Sum over all samples of the data.

    Args:
        model: The model.
        data: As in :func:`ms_optim.batch.batches`.
        parameters: What to measure, each tensor once.
        request: How.
        finish: Makes of the totals what the caller returns, to be attached to an error as ``partial``.
        group: Ranks to sum over.

    Returns:
        The totals.

    Raises:
        MsOptimError: As documented where the quantities are public; with ``partial``.
        KeyboardInterrupt: With ``partial`` as an attribute; nothing is left behind.
    """
    if group is not None:
        request = replace(request, generator=own_generator(request.generator, group))
    walk = _Walk(model, parameters, request, _zeros(parameters, request))
    device = next(iter(parameters.values())).device
    if device.type == "cpu":
        keep_pages()
    failure: BaseException | None = None
    try:
        with evaluation(model, request.statistics) as statistics, _progress(data, model, request.progress) as shown:
            for index, batch in enumerate(shown):
                batch.check_finite(index)
                walk.batch(batch.to(device).outside_inference(), index, statistics)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, (MsOptimError, KeyboardInterrupt)) and walk.totals.samples:
            error.partial = finish(walk.totals)  # type: ignore[union-attr]
        if group is None:
            raise
        failure = error
    if group is not None:
        agree_on_success(failure, device, group)
        _sum_totals(walk.totals, device, group)
    return walk.totals


def _zeros(parameters: Mapping[str, nn.Parameter], request: Request) -> Totals:
    """Nothing measured so far."""

    def zeros() -> dict[str, Tensor]:
        if request.entries:
            dtypes = (wide(p.detach().reshape(-1)[:0]).dtype for p in parameters.values())
            return {
                name: torch.zeros(p.shape, dtype=dtype, device=p.device)
                for (name, p), dtype in zip(parameters.items(), dtypes, strict=True)
            }
        device = next(iter(parameters.values())).device
        found = torch.zeros(len(parameters), dtype=torch.float64, device=device)
        return dict(zip(parameters, found.unbind(), strict=True))

    scattered = request.columns in (None, "rank") or request.probes > 1 or request.tolerance is not None
    return Totals(zeros(), zeros() if scattered else None, dict.fromkeys(parameters, True))


def _sum_totals(totals: Totals, device: torch.device, group: ProcessGroup) -> None:
    """Sum the totals over the ranks."""
    names = list(totals.values)
    # What is counted goes in one tensor; a name is "hessian" if it is everywhere, generic if it is anywhere.
    counts = [float(totals.samples), totals.backpropagations]
    counts += [float(not totals.hessian[name]) for name in names] + [float(name in totals.generic) for name in names]
    told = torch.tensor(counts, dtype=torch.float64, device=device)
    sum_over_ranks([told, *totals.values.values(), *(totals.variances or {}).values()], group)
    samples, backpropagations, *flags = told.tolist()
    totals.samples, totals.backpropagations = round(samples), backpropagations
    totals.hessian = {name: flag == 0 for name, flag in zip(names, flags, strict=False)}
    totals.generic = {name for name, flag in zip(names, flags[len(names) :], strict=True) if flag}


class _Walk:
    """The pass over the data.

    Attributes:
        totals: The sums over the batches that are done: one that fails or is interrupted leaves nothing in them.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], request: Request, totals: Totals
    ) -> None:
        self.model, self.parameters, self.request = model, parameters, request
        self.totals = self.running = totals  # running: with what the present batch has given so far
        self.scheme = Scheme(request, totals)
        self.orders: Orders = {}
        self.compared = False
        self.expected: Tensor | None = None  # the logits of the batch's first samples when they were planned with
        self.chunk: Chunk | None = None
        self.shapes: list[tuple[int, ...]] = []
        self.planned = 0  # the samples of the batch that the chunk was planned for
        self.unruled: list[str] = []  # parameters that the generic path has to measure

    def batch(self, batch: Batch, index: int, statistics: BatchStatistics) -> None:
        """Add one batch to the totals."""
        self.running = self.scheme.totals = self.totals.copy()
        self._add_batch(batch, index, statistics)
        self.totals = self.running  # one assignment: an interruption comes before it or after it

    def _add_batch(self, batch: Batch, index: int, statistics: BatchStatistics) -> None:
        """Add one batch: whole, or in chunks."""
        samples, whole = batch.samples, None
        chunk = self._plan(batch, index, statistics)
        if samples is None or chunk is None or chunk.samples >= samples:
            reading = self._read(batch, index)
            if self.expected is not None:
                _require_same(reading.logits.detach(), self.expected)
                self.expected = None
            if not reading.generic or reading.samples == 1:
                self._add(reading, None, chunk.group if chunk else None)
                return
            self.unruled = reading.generic
            if samples != reading.samples:
                raise self._unsplittable(_rows(samples, reading.samples))
            self.running.generic |= set(reading.generic)  # though of one sample alone it may be known where that lies
            whole = reading.logits.detach()
            del reading  # and its graph: those of the parts follow
            chunk = self.chunk = Chunk(1, chunk.group if chunk else 2**30)  # the generic path: one sample at a time
        assert samples is not None
        self._add_in_chunks(batch, samples, chunk, index, statistics, whole)

    def _add_in_chunks(
        self, batch: Batch, samples: int, chunk: Chunk, index: int, statistics: BatchStatistics, whole: Tensor | None
    ) -> None:
        """Add a batch in chunks, each of which must find the logits that the whole batch has, where they are known."""
        first, expected = not self.compared, torch.empty(0)
        if statistics.of_batch:
            with statistics.recording(), torch.no_grad():
                expected = finite_logits(batch.logits(self.model), index, self.request.loss, in_graph=False)
        elif whole is not None:
            expected = whole
        elif first:  # a few samples together, and not as many as a chunk has: the same show nothing
            few = min(3 if chunk.samples == 2 else 2, samples)
            with self._splitting(few, samples):  # (with a graph, without which some modules take other paths)
                logits = batch.rows(slice(0, few)).logits(self.model)
            expected = finite_logits(logits, index, self.request.loss, in_graph=False).detach()
        self.compared |= samples > 1
        noise: Tensor | None = None
        start = 0
        while start < samples:
            part = slice(start, min(start + chunk.samples, samples))
            statistics.rewind()
            rows = part.stop - part.start
            with self._splitting(rows, samples) if first and start == 0 else contextlib.nullcontext():
                reading = self._read(batch.rows(part), index)
            if reading.samples != rows:
                raise self._unsplittable(_rows(rows, reading.samples))
            _require_same(reading.logits.detach(), expected[part])
            if reading.generic and reading.samples > 1:  # not seen in the plan: which rules hold depends on the data
                self.unruled = reading.generic
                self.running.generic |= set(reading.generic)
                chunk = self.chunk = Chunk(1, chunk.group)
                continue
            if noise is None:
                noise = self.scheme.noise(samples, reading.classes)
            self._add(reading, None if noise is None else noise[:, part], chunk.group)
            del reading  # and its graph, before the next forward pass makes another one
            start = part.stop
        statistics.forget()

    def _plan(self, batch: Batch, index: int, statistics: BatchStatistics) -> Chunk | None:
        """How to split a batch; ``None``: not at all."""
        request, samples = self.request, batch.samples
        needed = isinstance(request.max_memory, int)
        if samples is None and needed:
            raise self._unsplittable("takes inputs of different first axes")
        if samples is None or samples == 0:
            return None
        shapes = [tuple(tensor.shape[1:]) for tensor in batch.tensors]
        if self.chunk is not None and shapes == self.shapes and samples <= self.planned:
            return self.chunk
        self.shapes, self.chunk, self.planned = shapes, None, samples
        how = (request.statistics, request.entries, request.columns, request.generic, request.max_memory)
        where = {(parameter.dtype, parameter.device) for parameter in self.parameters.values()}
        key = (samples, tuple(shapes), tuple(self.parameters), how, frozenset(where))
        plans = _PLANS.setdefault(self.model, {})
        if not needed and key in plans:
            self.chunk = plans[key]
            return self.chunk
        # With statistics of the batch a chunk costs a forward pass of the whole besides: only to save memory.
        large = 32 if statistics.of_batch and request.max_memory is None else 1
        small = samples <= _SMALL_SAMPLES * large and sum(t.numel() for t in batch.tensors) <= _SMALL_BYTES // 4 * large
        if not needed and small:
            return None
        few = min(2, samples)
        try:
            with self._splitting(few, samples) if needed else contextlib.nullcontext():
                reading = self._read(batch.rows(slice(0, few)), index)
        except (MsOptimError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # noqa: BLE001 - a model that cannot take two of the samples is measured whole
            return None
        if reading.samples != few:
            if not needed:
                return None
            raise self._unsplittable(_rows(few, reading.samples))
        if not statistics.of_batch:
            self.expected = reading.logits.detach()
        self.running.generic |= set(reading.generic)
        device, item = reading.logits.device, reading.logits.element_size()
        entries = sum(v.numel() * v.element_size() for v in self.totals.values.values()) if request.entries else 0
        generic = 2 * item * sum(self.parameters[name].numel() for name in reading.generic)
        budget = request.max_memory if isinstance(request.max_memory, int) else default_budget(device)
        if request.max_memory == "pass":
            budget = min(budget, reading.tape.activation_bytes * samples // few)
        try:
            self.chunk = plan_chunk(
                reading.tape,
                {name: rules for name, rules in reading.rules.items() if rules},
                measured=few,
                wanted=1 if reading.generic else samples,
                columns=self.scheme.columns(reading.classes),
                item=item,
                budget=budget,
                fixed=generic + 4 * entries + 4 * samples * reading.classes * item,
                cached=not statistics.of_batch and device.type == "cpu",
            )
        except MemoryBudgetError:
            if needed:
                raise
            return None  # a guess, of which nothing depends: whole
        if not needed and not reading.generic:  # the next one has to say again what is generic
            plans[key] = self.chunk
        return self.chunk

    @contextlib.contextmanager
    def _splitting(self, rows: int, samples: int) -> Iterator[None]:
        """The first call of the model with some of a batch's samples, which it may not take."""
        try:
            yield
        except (MsOptimError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._unsplittable(f"fails on {rows} of {samples} rows ({error!r})") from error

    def _unsplittable(self, what: str) -> MsOptimError:
        """The error of a batch that cannot be split, and has to be."""
        if self.unruled:
            names = ", ".join(self.unruled[:3]) + (" …" if len(self.unruled) > 3 else "")
            why = (
                f"the generic path needs it for {names}, which no curvature rule covers; put the batch first, pass "
                "batches of one sample, or freeze the parameter (requires_grad_(False)) to leave it out"
            )
        else:
            why = "max_memory needs it; put the batch first, pass smaller batches, or leave max_memory out"
        return CurvatureError(
            f"{type(self.model).__name__} {what}: its batch cannot be split along the first axis, and {why}"
        )

    def _read(self, batch: Batch, index: int) -> Reading:
        """One forward pass, read."""
        logits = finite_logits(batch.logits(self.model), index, self.request.loss)
        return Reading(logits, self.parameters, self.request, self.orders)

    def _add(self, reading: Reading, noise: Tensor | None, group: int | None) -> None:
        """Estimate a chunk and add it to the running totals."""
        totals = self.running
        with torch.no_grad():
            estimate = self.scheme.estimate(reading, noise, group)
            for position, name in enumerate(self.parameters):
                totals.values[name] = totals.values[name] + estimate.values[position]
                if totals.variances is not None and estimate.variances is not None:
                    totals.variances[name] = totals.variances[name] + estimate.variances[position]
        for name, kind in reading.tape.kind.items():
            totals.hessian[name] &= kind == "hessian"
        totals.generic |= set(reading.generic)
        totals.samples += reading.samples
        totals.backpropagations += estimate.columns * reading.samples


def _require_same(logits: Tensor, expected: Tensor) -> None:
    """Refuse a model whose logits for some samples depend on which others are in the batch."""
    found = logits[: len(expected)]
    # Kernels differ with the batch's size in the last digits, deep networks in more: far less than influence does.
    tolerance = torch.finfo(found.dtype).eps ** 0.5 * float(expected.abs().max().clamp_min(1.0)) if len(found) else 0.0
    if len(found) and not bool(((found - expected).abs() <= 10 * tolerance).all()):
        raise CurvatureError(
            "the logits of a sample change with the samples beside it (samples influence each other, or the first axis "
            "of the inputs is not the batch), so the batch cannot be split; put the batch first, use GroupNorm or "
            "nn.BatchNorm modules, or measure with batches of one sample"
        )


def _rows(asked: int | None, got: int) -> str:
    """What a model did that is not to be split."""
    rows = "inputs of different first axes" if asked is None else f"inputs of {asked} rows"
    return f"returned {got} rows of logits for {rows}"


@contextlib.contextmanager
def _progress(data: Any, model: nn.Module, wanted: bool | None) -> Iterator[Iterable[Batch]]:
    """The batches, with a bar if it is wanted, or on a terminal if it takes longer than two seconds; never required."""
    stream = batches(data, model)
    if wanted is False or isinstance(data, (Tensor, Batch, tuple, Mapping)):
        yield stream
        return
    try:
        from tqdm import tqdm  # an extra
    except ImportError:
        yield stream
        return
    try:
        total = len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader has a length only if its data set has one
        total = None
    hidden, delay = (None, 2) if wanted is None else (False, 0)  # None: where there is no terminal
    with tqdm(stream, total=total, desc="curvature", unit="batch", delay=delay, disable=hidden, leave=False) as bar:
        yield bar
