"""Who else perturbs weights: the SAMs of other authors, loaded from checkouts of their repositories.

Three of them are one file in a repository and no package, so they come from a folder:

    davda54/sam            SAM                     sam.py
    SamsungLabs/ASAM       ASAM, SAM               asam.py
    moskomule/sam.pytorch  SAMSGD                  sam.py

``pytorch_optimizer`` (kozistr) is a package, and is there if it can be imported.  Nothing of theirs is copied here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PYTORCH_OPTIMIZER = ("SAM", "FriendlySAM", "LookSAM", "WSAM", "GSAM", "BSAM")


def load_davda54(path: str | Path | None) -> type[Any] | None:
    """SAM of davda54/sam.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        The class, or ``None``.
    """
    return None if path is None else _loaded("davda54_sam", Path(path) / "sam.py").SAM


def load_davda54_running_stats(path: str | Path | None) -> tuple[Any, Any] | None:
    """What davda54/sam's README puts around its two passes for BatchNorm.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        Its functions that enable and disable running statistics, or ``None``.
    """
    if path is None:
        return None
    module = _loaded("davda54_bypass_bn", Path(path) / "example" / "utility" / "bypass_bn.py")
    return module.enable_running_stats, module.disable_running_stats


def load_asam(path: str | Path | None) -> tuple[type[Any], type[Any]] | None:
    """ASAM and SAM of SamsungLabs/ASAM, in this order.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        The classes, or ``None``.
    """
    if path is None:
        return None
    module = _loaded("samsunglabs_asam", Path(path) / "asam.py")
    return module.ASAM, module.SAM


def load_moskomule(path: str | Path | None) -> type[Any] | None:
    """SAMSGD of moskomule/sam.pytorch.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        The class, or ``None``.
    """
    return None if path is None else _loaded("moskomule_sam", Path(path) / "sam.py").SAMSGD


def load_pytorch_optimizer() -> dict[str, type[Any]] | None:
    """The sharpness-aware optimizers of the package ``pytorch_optimizer``.

    Returns:
        Name → class, or ``None`` if the package is not installed.
    """
    try:
        module = importlib.import_module("pytorch_optimizer")
    except ModuleNotFoundError:
        return None
    return {name: getattr(module, name) for name in PYTORCH_OPTIMIZER if hasattr(module, name)}


def _loaded(name: str, file: Path) -> ModuleType:
    """The module in a file, under a name by which pickle finds its classes again."""
    if name in sys.modules and sys.modules[name].__file__ == str(file):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"{file} is not there; give the folder of a checkout that holds {file.name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
