"""Put the present output of the three example plans into docs/planning.md (about a minute of processor time).

python scripts/planning_page.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
WHOLE = "chat"
"""The example whose output is shown to its end; the others stop before the notes, which are the same."""


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        heliosim("example", "--plans", "--out", "plans-in", folder=folder)
        for name in ("chat", "summarisation", "code"):
            shown = heliosim("plan", f"plans-in/{name}.yaml", folder=folder)
            text = "\n".join(line.rstrip() for line in shown.splitlines())
            if name != WHOLE:
                text = text.split("\nnote derived")[0]
            page, found = re.subn(
                rf"```text\nPlan {name} .*?```", lambda _, t=text: f"```text\n{t}\n```", page, count=1, flags=re.S
            )
            if not found:
                sys.exit(f"{PAGE}: no block for {name}")
    PAGE.write_text(page, encoding="utf-8")


def heliosim(*words: str, folder: str) -> str:
    command = [sys.executable, "-m", "heliosim.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 3):
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
