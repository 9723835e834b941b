"""The command line of `scripts/gpu_check`. First of all it looks for what it needs, with the standard library alone."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("numpy", "pandas", "plotly", "pyarrow", "pydantic", "rich", "safetensors", "scipy", "simpy", "tokenizers",
          "torch", "transformers", "typer", "yaml")  # fmt: skip


def missing(names: tuple[str, ...] = NEEDED) -> list[str]:
    """Modules that cannot be imported here."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def main() -> None:
    if absent := missing():
        remedy = "Install them, or put their unpacked wheels on PYTHONPATH."
        print(f"error: packages: not installed (value: {', '.join(absent)}). {remedy}", file=sys.stderr)
        raise SystemExit(2)
    from .command import main as run

    run()


if __name__ == "__main__":
    main()
