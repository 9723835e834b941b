"""Tuned exit heads: what they gain on held-out text, that the engine says the same, that nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from heliosim_calibrate.tuning.figures import figures_of, share_at_agreement  # noqa: E402
from heliosim_calibrate.tuning.text import documents_of, is_held_out, texts_of_file  # noqa: E402
from heliosim_calibrate.tuning.train import Recipe  # noqa: E402
from heliosim_calibrate.tuning.tune import Answer, Asked, tune_exits  # noqa: E402

from heliosim.engines.models.host import HostModel  # noqa: E402
from heliosim.engines.models.score import score  # noqa: E402
from heliosim.errors import InputError  # noqa: E402
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint  # noqa: E402
from tests.unit.conftest import Cli  # noqa: E402


def recipe(steps: int = 30, **changes: Any) -> Recipe:
    return Recipe((), 0, **{"steps": steps, "batch": 4, "every": 10, **changes})


def tuned(checkpoint: str, exits: list[int], out: Path | None, steps: int = 30, **changes: Any) -> Answer:
    asked = {"length": 128, "held_out_tokens": 2048, "mlp": 64, "recipe": recipe(steps)} | changes
    return tune_exits(Asked(checkpoint, exits, None, out, **asked))


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# --- what is gained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "e", "steps", "gain"), [("tiny-opt-s", 2, 70, 0.05), ("tiny-llama-s", 1, 40, 0.01)])
def test_tuning_raises_the_share_of_early_exits_at_equal_agreement(
    name: str, e: int, steps: int, gain: float, tmp_path: Path
) -> None:
    """The same frozen backbone, the same held-out text, the same agreement with the last layer among tokens that leave:
    more of them leave (the Llama was trained to exit anywhere, so little is left to gain there). And a live engine with
    the written heads finds what training measured.
    """
    source = checkpoint_path(name)
    before = digest(source)
    answer = tuned(name, [e], tmp_path / "tuned", steps)
    was, is_ = answer.before[e], answer.after[e]
    assert is_.tokens == was.tokens == answer.texts.held_out_tokens
    assert is_.exit_share > was.exit_share + gain
    assert is_.agreement > was.agreement
    assert is_.divergence < 0.95 * was.divergence
    assert digest(source) == before, "the checkpoint was touched"

    info = inspect_checkpoint(tmp_path / "tuned", "float32")
    assert (info.spec.exits, info.spec.kind) == ((e, 6), "fixed")
    assert (tmp_path / "tuned" / "model.safetensors").is_symlink()
    windows = answer.texts.held_out
    seen = score(HostModel(info), [[*window, 0] for window in windows], (e, 6))
    confidences = np.concatenate([s.max_probs[0] for s in seen]).astype(float)
    agrees = np.concatenate([s.ids[0] == s.ids[1] for s in seen])
    again = figures_of(confidences, agrees, 0.0, threshold=0.8, wanted_agreement=0.95)
    assert again.confident == pytest.approx(is_.confident, abs=2e-3)
    assert again.agreement == pytest.approx(is_.agreement, abs=2e-3)
    record = json.loads((tmp_path / "tuned" / "exit_tuning.json").read_text())
    assert record["exits"][str(e)]["after"]["exit_share"] == is_.exit_share


@pytest.mark.parametrize(
    ("mlp", "has_norm", "names"), [(0, True, {"norm.weight", "norm.bias"}), (32, False, {"fc1", "fc2"})]
)
def test_norm_and_mlp_are_optional(mlp: int, has_norm: bool, names: set[str], tmp_path: Path) -> None:
    answer = tuned("tiny-opt-s", [2, 4], tmp_path / "tuned", 20, mlp=mlp, recipe=recipe(20, has_norm=has_norm))
    info = inspect_checkpoint(tmp_path / "tuned", "bfloat16")
    found = {source.removeprefix("exits.2.") for part in info.head_parts(2) for source in part.sources}
    assert {n if n.startswith("norm") else n.split(".")[0] for n in found} == names
    assert answer.after[2].divergence < answer.before[2].divergence
    resident = HostModel(info).resident(2)
    assert resident.nbytes == info.spec.weights_bytes(2)
    assert torch.isfinite(resident.logits(torch.randn(3, 128, dtype=torch.bfloat16), 2)).all()


def test_it_trains_in_bfloat16(tmp_path: Path) -> None:
    answer = tuned("tiny-llama-s", [2], tmp_path / "tuned", 20, dtype="bfloat16")
    assert answer.after[2].divergence < answer.before[2].divergence


def test_the_same_seed_gives_the_same_heads(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tuned("tiny-opt-s", [2], tmp_path / name, 10, recipe=recipe(10, seed=seed))
    a, b, c = ({p.name for p in (tmp_path / n).glob("exit_heads.*")} for n in "abc")
    assert a == b != c


def test_it_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    answer = tuned("tiny-opt-s", [2], tmp_path / "t", 50, recipe=recipe(50, rate=0.0, every=5, patience=2))
    assert answer.steps == 10
    assert answer.why == "no progress in 2 evaluations"
    assert answer.untuned == (2,)
    assert answer.after == answer.before


# --- interruptions and writing ----------------------------------------------------------------------------------------


def interrupted_at(step: int) -> Any:
    def progress(what: str, share: float) -> None:
        if what.startswith(f"step {step} "):
            raise KeyboardInterrupt

    return progress


def test_an_interruption_keeps_the_best_heads_so_far(tmp_path: Path) -> None:
    asked = Asked("tiny-opt-s", [2], None, tmp_path / "t", mlp=32, length=64, held_out_tokens=512, recipe=recipe(40))
    answer = tune_exits(asked, interrupted_at(15))
    assert (answer.why, answer.steps) == ("interrupted", 15)
    assert answer.after[2].divergence < answer.before[2].divergence
    assert json.loads((tmp_path / "t" / "exit_tuning.json").read_text())["exits"]["2"]["best_step"] == 10


def test_an_interruption_before_the_first_look_writes_nothing(tmp_path: Path) -> None:
    asked = Asked("tiny-opt-s", [2], None, tmp_path / "t", mlp=32, length=64, held_out_tokens=512, recipe=recipe(40))
    with pytest.raises(KeyboardInterrupt):
        tune_exits(asked, interrupted_at(5))
    assert list(tmp_path.iterdir()) == []


def test_heads_beside_the_checkpoint_replace_older_ones_only_if_asked(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(checkpoint_path("tiny-llama-s"), mine)
    (mine / "exits.json").unlink()
    weights = digest(mine)
    tuned(str(mine), [2], None, 10)
    first = inspect_checkpoint(mine, "float32").head_file
    assert first is not None
    with pytest.raises(InputError, match="says already where it exits"):
        tuned(str(mine), [3], None, 10)
    tuned(str(mine), [3], None, 10, overwrite=True)
    info = inspect_checkpoint(mine, "float32")
    assert info.spec.exits == (3, 6)
    assert not first.exists()
    assert {n: d for n, d in digest(mine).items() if n in weights} == weights
    assert {p.name for p in mine.iterdir()} - set(weights) == {info.head_file.name, "exits.json", "exit_tuning.json"}  # type: ignore[union-attr]


def test_a_folder_of_copies_stands_alone(tmp_path: Path) -> None:
    tuned("tiny-opt-s", [2], tmp_path / "t", 10, is_copied=True)
    assert not any(p.is_symlink() for p in (tmp_path / "t").iterdir())
    with pytest.raises(InputError, match="already exists"):
        tuned("tiny-opt-s", [2], tmp_path / "t", 10)
    (tmp_path / "t" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no part of a tuned checkpoint"):
        tuned("tiny-opt-s", [2], tmp_path / "t", 10, overwrite=True)
    (tmp_path / "t" / "notes.txt").unlink()
    tuned("tiny-opt-s", [4], tmp_path / "t", 10, overwrite=True)
    assert inspect_checkpoint(tmp_path / "t", "float32").spec.exits == (4, 6)


# --- text and figures -------------------------------------------------------------------------------------------------


def test_the_split_goes_by_content(tmp_path: Path) -> None:
    documents = [f"document number {i} about {i * i}" for i in range(400)]
    plain, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("\n\n".join(documents))
    rows.write_text("\n".join(json.dumps({"text": d}) for d in reversed(documents)))
    assert [d.strip() for d in documents_of(plain)] == documents
    held = [d for d in documents if is_held_out(d)]
    assert 20 < len(held) < 60
    sizes = {"length": 10_000, "train_tokens": 10**6, "held_out_tokens": 10**6}
    for path in (plain, rows):
        made = texts_of_file(path, lambda text: [int(text.split()[2])] * 9, [], **sizes)
        seen = {i for window in made.held_out for i in window}
        assert seen == {int(d.split()[2]) for d in held}
        assert not seen & {i for window in made.train for i in window}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "short", "too little text"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}', "line 2: has neither"),
        ("a.jsonl", '{"text": ', "line 1: not JSON"),
        ("a.jsonl", "[1]", "line 1: has neither"),
    ],
)
def test_bad_text_says_what_is_wrong(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        tune_exits(Asked("tiny-opt-s", [2], tmp_path / name, tmp_path / "t"))
    assert said in str(caught.value)


def test_the_share_at_an_agreement() -> None:
    """Tokens by falling confidence agree 1 1 0 1 1 0: of the first five, four agree."""
    confidences = np.array([0.3, 0.9, 0.8, 0.7, 0.6, 0.5])
    agrees = np.array([False, True, True, False, True, True])
    for wanted, share in ((1.0, 2 / 6), (0.8, 5 / 6), (0.76, 5 / 6), (0.6, 1.0)):
        assert share_at_agreement(confidences, agrees, wanted) == pytest.approx(share)
    assert share_at_agreement(confidences, ~agrees, 0.9) == 0.0
    tied = np.array([0.9, 0.9, 0.5])
    assert share_at_agreement(tied, np.array([True, False, False]), 0.9) == 0.0, "one of two tied tokens cannot leave"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exits": [6]}, "no exit before the last layer"),
        ({"exits": [9]}, "no layer of a model with 6"),
        ({"out": None}, "a shipped checkpoint is not written to"),
        ({"dtype": "float16"}, "gradients vanish"),
        ({"length": 4096}, "the model has 512 positions"),
        ({"mlp": 0, "recipe": recipe(has_norm=False)}, "nothing to train"),
        ({"checkpoint": "random:opt-1.3b"}, "random weights say nothing"),
        ({"text": Path("gone.txt")}, "no such file"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_training(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    asked = {"checkpoint": "tiny-opt-s", "exits": [2], "text": None, "out": tmp_path / "t"} | changes
    with pytest.raises(InputError) as caught:
        tune_exits(Asked(**asked))
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    options = ["--builtin", "--out", "t", "--steps", 10, "--batch", 2, "--length", 64, "--every", 5]
    options += ["--held-out-tokens", 512, "--mlp", 16]
    code, out, err = cli("calibrate", "tune-exits", "tiny-opt-s", "--exits", "2,4", *options)
    assert code == 0, err
    assert out.count("untuned") == 2
    assert "95% agreement" in out
    assert inspect_checkpoint(tmp_path / "t", "float32").spec.exits == (2, 4, 6)
    for arguments, said in (
        (("calibrate", "tune-exits", "tiny-opt-s", "--exits", "2,x", "--builtin"), "no list of layers"),
        (("calibrate", "tune-exits", "tiny-opt-s", "--exits", "2"), "give a text or --builtin"),
        (
            ("calibrate", "--threads", 2, "tune-exits", "tiny-opt-s", "--exits", "2"),
            "--threads: is no option of tune-exits",
        ),
        (("calibrate", "--models", "tiny-opt-s"), "--out: is missing"),
        (
            ("calibrate", "--out", "p", "--random-weights", "opt-1.3b", "--models", "tiny-opt-s"),
            "--models: random weights",
        ),
        (("calibrate", "--out", "p", "--random-weights", "opt-9b"), "Did you mean"),
    ):
        code, _, err = cli(*arguments)
        assert (code, len(err.splitlines())) == (2, 1)
        assert said in err
