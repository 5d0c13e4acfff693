"""Functions of trials that cost nothing, for real processes."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from ms_optim.errors import DivergedError


def accuracy(settings):
    """Best at ρ = 0.1 on validation; test accuracy is something else altogether."""
    rho, seed = settings.get("rho", 0.0), settings.get("seed", 0)
    print(f"ρ is {rho}")
    bend = (math.log10(rho) + 1) ** 2 if rho else 2.0
    return {"validation_top1": 90 - bend + 0.1 * seed, "test_top1": 80 + 0.01 * seed, "train_loss": 0.5}


def misbehaving(settings):
    """As the setting says."""
    what = settings["what"]
    print(f"what is {what}: ε")
    os.write(1, b"from below Python\n")
    if what == "raise":
        raise ValueError("rho must be\nat least 0")
    if what == "exit":
        sys.exit(3)
    if what == "vanish":
        os._exit(5)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "diverge":
        return {"validation_top1": 10.0, "train_loss": math.nan}
    if what == "diverge early":
        raise DivergedError("the loss is nan in epoch 3")
    if what == "nothing":
        return None
    if what == "odd":
        return {"model": object()}
    return {"validation_top1": 50.0, "process": os.getpid()}


def surroundings(settings):
    """What a process finds."""
    import torch

    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    found = {name: os.environ.get(name) for name in names}
    return {**found, "threads": torch.get_num_threads(), "process": os.getpid(), "resume": settings["resume"]}


def epochs(settings):
    """Counts to ``epochs``, keeps where it is in a file, and goes on from there; says when it has begun."""
    folder = Path(settings["output"]) / settings["experiment"]
    folder.mkdir(exist_ok=True)
    state = folder / "epoch.json"
    first = json.loads(state.read_text()) if state.exists() else 0
    with (folder / "processes.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    for epoch in range(first, settings["epochs"]):
        time.sleep(settings["seconds"])
        temporary = state.with_suffix(".new")
        temporary.write_text(json.dumps(epoch + 1))
        temporary.replace(state)
    return {"epochs": settings["epochs"], "first": first}
