from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from heliosim import tasks

CHECKPOINTS = Path(tasks.__file__).parent / "checkpoints"
NAMES = ("tiny-opt-s", "tiny-opt-l", "tiny-llama-s", "tiny-llama-l")
LIMIT_BYTES = 20_000_000


def read(name: str, file: str) -> dict[str, object]:
    value = json.loads((CHECKPOINTS / name / file).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def test_all_folders_together_stay_small() -> None:
    files = [path for name in NAMES for path in (CHECKPOINTS / name).rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_exits_fit_the_model(name: str) -> None:
    config, exits = read(name, "config.json"), read(name, "exits.json")
    layers = exits["exits"]
    assert isinstance(layers, list)
    assert exits["schema_version"] == 1
    assert layers == sorted(set(layers))
    assert layers[0] >= 1
    assert layers[-1] == config["num_hidden_layers"]
    assert exits["kind"] == ("fixed" if config["model_type"] == "opt" else "anywhere")
    assert (exits["head_file"] is None) == (exits["kind"] == "anywhere")
    if exits["head_file"] is not None:
        assert (CHECKPOINTS / name / str(exits["head_file"])).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_training_is_recorded(name: str) -> None:
    training = read(name, "training.json")
    mix = training["mix"]
    assert isinstance(mix, dict)
    assert set(mix) == set(tasks.FAMILIES)
    assert sum(mix.values()) == pytest.approx(1.0)
    assert min(mix.values()) >= 0.05
    assert set(training["held_out_loss"]) == set(tasks.FAMILIES)  # type: ignore[call-overload]


def test_members_share_one_tokenizer() -> None:
    assert len({(CHECKPOINTS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_loads_without_missing_weights(name: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == 1024


def test_tokenizer_loads_and_returns_the_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINTS / NAMES[0])
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "def f(x):\n    return 12 + 345  # déjà vu"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", ["tiny-opt-s", "tiny-opt-l"])
def test_heads_have_the_promised_names_and_shapes(name: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    exits = read(name, "exits.json")
    layers = exits["exits"]
    assert isinstance(layers, list)
    wanted = {
        f"exits.{layer}.{part}": shape
        for layer in layers[:-1]
        for part, shape in (
            ("fc1.weight", [512, 128]),
            ("fc1.bias", [512]),
            ("fc2.weight", [128, 512]),
            ("fc2.bias", [128]),
        )
    }
    with safetensors.safe_open(CHECKPOINTS / name / str(exits["head_file"]), framework="np") as file:
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {key: one.get_shape() for key, one in found.items()} == wanted
        assert {one.get_dtype() for one in found.values()} == {"F16"}


@pytest.mark.parametrize("name", NAMES)
def test_the_large_and_small_members_know_their_tasks(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    losses = []
    for document in islice(tasks.documents("chat", "live", 0), 5):
        prompt = [1, *tokenizer(document.prompt, add_special_tokens=False)["input_ids"]]
        ending = tokenizer(document.completion, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ending])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ending)).item())
    assert sum(losses) / len(losses) < 1.5  # a guess among 1,024 entries has 6.9


def test_held_out_documents_are_never_trained_on() -> None:
    for family in tasks.FAMILIES:
        trained = {document.prompt for document in islice(tasks.documents(family, "train", 101), 3000)}
        for split in ("calibration", "live"):
            held_out = {document.prompt for document in islice(tasks.documents(family, split, 0), 300)}
            assert not trained & held_out
