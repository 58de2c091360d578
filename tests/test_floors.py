"""The architecture: a module imports only from lower floors, found by walking the syntax tree."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flexure

ROOT = Path(flexure.__file__).parent

FLOORS = {
    **dict.fromkeys(("contracts", "calling", "record", "addresses", "memory", "progress"), 0),
    **dict.fromkeys(("columns", "store", "fingerprints", "processes", "per_sample", "batched"), 0),
    **dict.fromkeys(("measuring", "wide"), 0),
    **dict.fromkeys(("units", "data", "layers"), 1),
    **dict.fromkeys(("surgery", "models", "measure", "attacks"), 2),
    **dict.fromkeys(("train", "penalties"), 3),
    "methods": 4,
    "report": 5,
    "recipes": 6,
    **dict.fromkeys(("cli", "__main__", "__init__"), 7),
}

FILES = sorted(ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports_of(path: Path) -> list[str]:
    """The first name below `flexure` of everything that a file imports, lazily or not."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "flexure":
                known = (alias.name if alias.name in FLOORS else "__init__" for alias in node.names)
                names = [f"flexure.{name}" for name in known]
        else:
            continue
        found += [name.split(".")[1] for name in names if name.startswith("flexure.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    package = package_of(path)
    for imported in imports_of(path):
        if package == "__init__" and path != ROOT / "__init__.py":
            continue
        if imported == package and FLOORS[package] > 0:
            continue
        below = FLOORS[imported] < FLOORS[package]
        same_floor_file = FLOORS[imported] == FLOORS[package] in (0, 7)
        assert below or same_floor_file, f"{package} (floor {FLOORS[package]}) imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_say_what_lives_in_them_and_stay_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert text.count("\n") <= 400


def test_no_cycles_between_packages_of_one_floor() -> None:
    edges = {(package_of(path), name) for path in FILES for name in imports_of(path)}
    for a, b in edges:
        if a != b and FLOORS[a] == FLOORS[b] and FLOORS[a] not in (0, 7):
            pytest.fail(f"{a} and {b} are on one floor")


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import time, torch, numpy\n"
        "start = time.process_time()\n"
        "import sys, flexure\n"
        "heavy = {'sklearn', 'matplotlib', 'transformers', 'datasets', 'timm', 'jinja2', 'typer',"
        " 'accelerate', 'rich'}\n"
        "print(time.process_time() - start, sorted(heavy & set(sys.modules)))"
    )
    times = []
    # As installed: the first of three compiles to bytecode, which the others find.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        seconds, heavy = out.stdout.split(" ", 1)
        assert heavy.strip() == "[]"
        times.append(float(seconds))
    assert min(times) < 0.2
