"""Run the command line from a checkout that is not installed; calibrate/ and app/ take the names of the wheel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for folder, name in (("calibrate", "heliosim_calibrate"), ("app", "heliosim_app")):
    spec = importlib.util.spec_from_file_location(
        name, ROOT / folder / "__init__.py", submodule_search_locations=[str(ROOT / folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

from heliosim.cli import main  # noqa: E402

main()
