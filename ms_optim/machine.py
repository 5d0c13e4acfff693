"""Machine: what numbers depend on besides their settings, and nothing that names the machine or its folders."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__


def software() -> dict[str, str]:
    """The versions of what computes.

    Returns:
        Name → version, and the system.
    """
    return {
        "ms_optim": __version__,
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The model of the CPU, as its maker calls it.

    Returns:
        Its name; empty where the system does not say.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else ""
