"""The house: what importing the package costs, which way its rooms depend on each other, what it exports."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ms_optim

PACKAGE = Path(ms_optim.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import the rooms of lower floors only; rooms on one floor do not see each other.
FLOORS = [
    {"errors"},
    {"batch", "models"},
    {"symmetry", "curvature"},
    {"balancing"},
    {"sharpness"},
    {"optim"},
    {"integrations", "compat", "checkup"},
    {"__init__"},
    {"machine"},
    {"demo", "testing"},
    {"cli"},
    {"train"},
    {"sweep"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: Path) -> str:
    """The folder or file directly inside the package; the package itself is ``__init__``."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(module: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth of its code."""
    package = ["ms_optim", *module.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from .. import errors` names a module, `from ..errors import DataError` an object in one.
            found |= {".".join([*base, alias.name]) for alias in node.names} if len(base) == 1 else {".".join(base)}
    return found


def imported_rooms(module: Path) -> set[str]:
    """Rooms of the package that a file imports from; an object taken from the catalogue itself is ``__init__``."""
    rooms = set()
    for name in imported_modules(module):
        if name.partition(".")[0] == "ms_optim":
            room = name.split(".")[1] if "." in name else "__init__"
            is_module = (PACKAGE / f"{room}.py").exists() or (PACKAGE / room).is_dir()
            rooms.add(room if is_module else "__init__")
    return rooms - {room_of(module)}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_run_one_way(module):
    room = room_of(module)
    if room == "reference":
        # An oracle that shares code with what it judges judges nothing.
        foreign = {name.partition(".")[0] for name in imported_modules(module)} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "numpy", "scipy", "ms_optim"}
        assert imported_rooms(module) == set()
        return
    assert room in FLOOR, f"{module} is in a room without a floor; give it one in FLOORS"
    upward = {other for other in imported_rooms(module) if FLOOR.get(other, len(FLOORS)) >= FLOOR[room]}
    assert upward == set()


def test_the_reading_of_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for room in ("optim", "balancing", "curvature", "symmetry"):
        (tmp_path / room).mkdir()
    (tmp_path / "errors.py").touch()
    file = tmp_path / "balancing" / "solve.py"
    file.write_text(
        "import ms_optim.optim.sam\n"
        "from .. import errors\n"
        "from .program import Program\n"
        "from ..symmetry.group import ScaleGroup\n"
        "def late():\n    from ms_optim.curvature import trace\n    from ms_optim import MSSAM\n"
    )
    assert imported_rooms(file) == {"optim", "errors", "symmetry", "curvature", "__init__"}


def test_importing_the_package_imports_no_optional_or_heavy_library():
    heavy = {"timm", "torchvision", "sklearn", "matplotlib", "tqdm"}
    # Beyond what torch imports: torch.hub takes tqdm where it finds it.
    code = "import sys, torch; known = set(sys.modules); import ms_optim, ms_optim.integrations; "
    code += f"print(sorted({heavy} & (set(sys.modules) - known)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "[]"


def test_every_public_name_exists_and_explains_itself():
    assert ms_optim.__all__, "the catalogue is empty"
    assert len(set(ms_optim.__all__)) == len(ms_optim.__all__)
    public = [name for name in ms_optim.__all__ if not name.startswith("__")]
    silent = [name for name in public if not inspect.getdoc(getattr(ms_optim, name))]
    assert silent == []


def test_every_module_opens_with_its_argument():
    silent = [str(m) for m in MODULES if not ast.get_docstring(ast.parse(m.read_text(encoding="utf-8")))]
    assert silent == []


def test_no_file_is_a_catch_all():
    names = {"utils", "util", "helpers", "helper", "common", "misc"}
    parts = {m: {part.removesuffix(".py") for part in m.relative_to(PACKAGE).parts} for m in MODULES}
    assert [str(m) for m in MODULES if names & parts[m]] == []


def test_every_folder_of_modules_is_a_package():
    # setuptools leaves a folder without __init__.py out of the wheel, without a word.
    assert [str(m.parent) for m in MODULES if not (m.parent / "__init__.py").exists()] == []


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
