"""What may import what: serving knows neither SimPy nor torch, and help does not pay for what it does not use."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import heliosim

PACKAGE = Path(heliosim.__file__).parent
SERVING = sorted((PACKAGE / "serving").glob("*.py"))
HEAVY = ("torch", "transformers", "streamlit", "scipy.stats", "pandas", "plotly")


def imported(source: str) -> set[str]:
    """Every module that a source names in an import, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules_after(code: str) -> set[str]:
    """Names in ``sys.modules`` after a fresh interpreter ran ``code``."""
    tail = "\nimport json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr))


def test_every_serving_module_is_looked_at() -> None:
    assert {"server.py", "batcher.py", "memory.py", "controller.py", "helios.py"} <= {p.name for p in SERVING}


@pytest.mark.parametrize("path", SERVING, ids=lambda p: p.stem)
def test_serving_imports_only_the_standard_library_numpy_and_its_own_layer(path: Path) -> None:
    allowed = ("heliosim.types", "heliosim.errors", "heliosim.recorder", "heliosim.serving")
    for name in imported(path.read_text(encoding="utf-8")):
        is_ours = name.partition(".")[0] == "heliosim"
        assert name.startswith(allowed) if is_ours else name.partition(".")[0] in (*sys.stdlib_module_names, "numpy"), (
            name
        )


def test_serving_never_asks_the_time() -> None:
    for path in SERVING:
        assert not imported(path.read_text(encoding="utf-8")) & {"time", "datetime"}, path.name


def test_serving_as_a_whole_loads_neither_simpy_nor_torch() -> None:
    names = [f"heliosim.serving.{p.stem}" for p in SERVING if p.stem != "__init__"]
    loaded = modules_after(f"import {', '.join(names)}")
    assert set(names) <= loaded
    assert not {m for m in loaded if m.partition(".")[0] in ("simpy", "torch", "transformers", "pyarrow", "pandas")}


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(argument: str) -> None:
    code = f"""
import sys
import tomllib
sys.argv = ["heliosim", {argument!r}]
from heliosim.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    loaded = modules_after(code)
    assert "heliosim.cli" in loaded
    assert not loaded & set(HEAVY)


def test_a_simulation_needs_no_torch() -> None:
    loaded = modules_after("import heliosim.runs, heliosim.simulate, heliosim.formats.profile, heliosim.examples")
    assert "simpy" in loaded
    assert not {m for m in loaded if m.partition(".")[0] in ("torch", "transformers", "streamlit")}


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py")}
    assert found == {name for name in listed if name.split(".")[0] == "heliosim"}
