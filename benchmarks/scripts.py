"""The scripts of this folder: what runs as a module and takes ``--scale``, found by reading, none imported."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent


def names(folder: Path = FOLDER) -> list[str]:
    """Every script of a folder.

    Args:
        folder: The folder.

    Returns:
        Their names, in alphabetical order.
    """
    found = [path for path in folder.glob("*.py") if is_script(path.read_text(encoding="utf-8"))]
    return sorted(path.stem for path in found if path.stem != "__main__")  # which runs them


def is_script(source: str) -> bool:
    """Whether a module is run on its own and has a scale, by an option of its own or by ``main`` of another module.

    Args:
        source: Its text.

    Returns:
        Whether it is.
    """
    tree = ast.parse(source)
    guarded = any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body)
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    if not guarded or not mains:
        return False
    within = list(ast.walk(mains[0]))
    borrowed = any(isinstance(node, ast.Attribute) and node.attr == "main" for node in within)
    return borrowed or any(isinstance(node, ast.Constant) and node.value == "--scale" for node in within)
