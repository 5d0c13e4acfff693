"""What a step of every method takes on a row: time in units of one of SGD's, gradients, memory.

Methods run in random order in every round, ratios are taken within a round (:mod:`benchmarks.harness`), and their mean
is the number: a round is ten steps, there are ten rounds, and a representative is found anew every hundred steps, so
that its share of the cost is in the mean and would not be in the median.

Memory is the peak of a process of its own above model and images, over the first ten steps, of which one has a refresh:
activations, gradients, momentum and all that an optimizer keeps or copies.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness, memory
from .problems import Data, Problem
from .training import optimizer_of, read

STEPS, ROUNDS, REFERENCE = 10, 10, "SGD"


def stepping(problem: Problem, data: Data, name: str, options: Mapping[str, Any]) -> Callable[[], int]:
    """A method at work on a row.

    Args:
        problem: The row.
        data: Its images.
        name: The optimizer.
        options: Its arguments.

    Returns:
        Takes ten steps, and gives the number of gradients of the loss.
    """
    torch.manual_seed(0)
    model = problem.build().to(data.train[0].device)
    optimizer = optimizer_of(model, name, 0.01, 0.0, options)
    x, y = (part[: problem.batch] for part in data.train)

    def steps() -> int:
        gradients = 0

        def closure() -> Tensor:
            nonlocal gradients
            gradients += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        model.train()
        for _ in range(STEPS):
            optimizer.step(closure)  # type: ignore[arg-type]  # torch asks for a float, and documents a tensor
        return gradients

    return steps


def prepared(settings: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Callable[[], int]:
    """The same in a process of its own, for its peak of memory.

    Args:
        settings: ``problem``, ``scale``, ``seed``.
        name: The optimizer.
        options: Its arguments.

    Returns:
        Takes ten steps.
    """
    torch.set_num_threads(1)
    memory.only_what_is_alive()
    problem, data = read(settings)
    balanced = name in ("MSSAM", "MSRegularizedSGD") or options.get("rebalance") is not None
    often = {"refresh_every": STEPS} if balanced else {}
    stepping(problem, data, name, {**options, **often})()  # pays for imports and for what is allocated once
    return stepping(problem, data, name, {**options, **often})


def measured(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time and memory of all methods on a row: a function of sweeps.

    Args:
        settings: ``cost``: method → optimizer and its options; ``problem``, ``scale``, ``seed``.

    Returns:
        ``methods``: method → ``ratio`` to SGD's time, ``seconds`` per step and those of the ``rounds``, ``gradients``
        per step, ``mib``.
    """
    problem, data = read(settings)
    full = settings["scale"] != "smoke"
    device = str(data.train[0].device)
    methods = settings["cost"]
    contenders = {name: stepping(problem, data, *method) for name, method in methods.items()}
    gradients = {name: contender() / STEPS for name, contender in contenders.items()}  # and the first refresh
    runs = harness.paired("", contenders, ROUNDS if full else 2, device=device, warm=0)
    failed = [run["failed"] for run in runs if "failed" in run]
    if failed:
        raise RuntimeError(failed[0])
    seconds = {(run["contender"], run["round"]): run["seconds"] for run in runs}
    found: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        mine = {index: taken for (other, index), taken in seconds.items() if other == name}
        ratio = statistics.fmean(taken / seconds[REFERENCE, index] for index, taken in mine.items())
        rounds = [mine[index] / STEPS for index in sorted(mine)]
        found[name] = {"ratio": ratio, "seconds": statistics.fmean(rounds), "rounds": rounds}
        found[name]["gradients"] = gradients[name]
        if full:
            plain = {key: settings[key] for key in ("problem", "scale", "seed")}
            peak = memory.peak_above(prepared, plain, *method, device=device)
            if "peak_bytes" in peak:
                found[name]["mib"] = peak["peak_bytes"] / 2**20
    return {"methods": found}
