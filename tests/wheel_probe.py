"""Run by ``scripts/wheel_test`` in an environment that has the wheel and its base dependencies only; not a test itself.

Checks that nothing but live mode needs torch, and that data files came with the wheel. Prints one line.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages

LIVE = tuple(
    f"heliosim.engines.{name}"
    for name in ("attention", "fast", "models", "parallel", "residency", "running", "sampler", "torch")
)
"""Modules that may need the extra ``live``."""


def main() -> None:
    for absent in ("torch", "transformers", "streamlit"):
        assert find_spec(absent) is None, f"{absent} is installed: this environment is not the empty one"
    import heliosim

    package = Path(heliosim.__file__).parent
    assert "site-packages" in package.parts, f"{package} is not the installed wheel"
    modules = [m.name for m in walk_packages(heliosim.__path__, "heliosim.") if not m.name.startswith(LIVE)]
    for name in modules:
        import_module(name)
    assert {"heliosim.serving.server", "heliosim.simulate", "heliosim.runs", "heliosim.cli"} <= set(modules)
    assert "torch" not in sys.modules

    from heliosim.formats.checkpoint import inspect_checkpoint
    from heliosim.profile_view import check_profile, open_profile, shipped_profiles

    checkpoints = sorted(p.parent for p in (package / "checkpoints").glob("*/model.safetensors"))
    assert checkpoints, "no checkpoint came with the wheel"
    for folder in checkpoints:
        heads = json.loads((folder / "exits.json").read_text(encoding="utf-8")).get("head_file")
        assert heads is None or (folder / heads).is_file(), f"{folder.name}: {heads} is missing"
        info = inspect_checkpoint(folder, "float32")
        assert info.spec.exits[-1] == info.spec.layers, folder.name
        assert len(info.weights_sha256()) == 64
        assert (folder / "tokenizer.json").is_file(), f"{folder.name}: no tokenizer"
    card = package / "checkpoints" / "README.md"
    assert card.is_file(), "the model card is missing"
    for folder in checkpoints:
        assert folder.name in card.read_text(encoding="utf-8"), f"the model card does not speak of {folder.name}"
    profiles = shipped_profiles()
    for name in profiles:
        profile = open_profile(name)
        assert check_profile(profile) == 0, name
        assert profile.behaviour.texts, name
    from heliosim.hardware.architecture import open_architecture, shipped_architectures
    from heliosim.hardware.device import open_device, shipped_devices

    assert shipped_architectures(), "no architecture came with the wheel"
    assert shipped_devices(), "no device came with the wheel"
    for name in shipped_architectures():
        assert open_architecture(name).parameters() > 0, name
    for name in shipped_devices():
        assert open_device(name).name == name
    from tempfile import TemporaryDirectory

    from heliosim.example_sets import SETS, write_set

    with TemporaryDirectory() as out:
        for name in SETS:
            assert write_set(Path(out) / name, name), name
    version = metadata.version("heliosim")
    print(
        f"wheel {version}: {len(modules)} modules without torch, checkpoints {', '.join(p.name for p in checkpoints)}, "
        f"profiles {', '.join(profiles) or 'none'}"
    )


if __name__ == "__main__":
    main()
