"""A batch of 64, prompts and all, on this engine and in transformers, one behind the other in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from heliosim.hardware.architecture import shipped_architectures

from .book import Book
from .plan import LLAMA
from .shapes import drop_engine, dtype_of, engine_of
from .steps import Bench

REPEATS = 2


def sizes(book: Book) -> tuple[int, int, int]:
    """Rows, prompt tokens, generated tokens of each row."""
    return (64, 128, 128) if book.options.is_gpu else (8, 16, 16)


def run(book: Book) -> None:
    """Tokens generated per second, the reading of prompts included."""
    rows, prompt, output = sizes(book)
    book.note(
        f"{rows} rows, prompts of {prompt} tokens, {output} generated for each; greedy; {dtype_of(book.options)}."
    )
    engine = engine_of(book)
    bench = Bench(engine, LLAMA.model, book.options.seed)
    rates = []
    for _ in range(REPEATS + 1):
        bench.place(bench.spec.layers, rows, prompt + output + 1)
        seconds = bench.fill(rows, prompt) + bench.decode(output - 1)
        rates.append(rows * output / seconds)
        book.row(engine="heliosim", rows=rows, prompt=prompt, output=output, seconds=seconds)
    book.put("throughput.engine", max(rates[1:]), low=min(rates[1:]), high=max(rates[1:]))
    vocab = engine.vocab
    bench.drop()
    del bench, engine
    drop_engine(book)
    _transformers(book, vocab, max(rates[1:]))


def _transformers(book: Book, vocab: int, ours: float) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    rows, prompt, output = sizes(book)
    model = _model(book)
    generator = torch.Generator().manual_seed(book.options.seed)
    ids = torch.randint(2, vocab, (rows, prompt), generator=generator).to(book.options.device)
    same = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False, "eos_token_id": None,
            "pad_token_id": 0, "attention_mask": torch.ones_like(ids), "cache_implementation": "static"}  # fmt: skip

    def generate(**changes: Any) -> Callable[[], int]:
        def call() -> int:
            with torch.inference_mode():
                return int(model.generate(ids, **same, **changes).shape[1] - prompt) * rows

        return call

    def batching() -> int:
        made = model.generate_batch(
            inputs=ids.tolist(),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=True
            ),
        )
        return sum(len(found.generated_tokens) for found in made.values())

    best = _time(book, "generate", generate(disable_compile=True))
    if not book.options.is_gpu:
        book.cannot("throughput.compiled", "not tried on a CPU: compiling takes longer than this check")
        book.cannot("throughput.batching", "needs a GPU")
    else:
        _time(book, "batching", batching)
        _ratio(book, ours, [best])
        best = max((r for r in (best, _time(book, "compiled", generate())) if r is not None), default=None)
    _ratio(book, ours, [best])


def _model(book: Book) -> Any:
    """transformers' model of the same shape with random weights, on the device."""
    import torch
    import transformers

    path = shipped_architectures()[LLAMA.model]
    if not book.options.is_gpu:
        path = book.shared["work"] / "shapes" / f"{LLAMA.model}.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    config = transformers.AutoConfig.for_model(**values)
    dtype = getattr(torch, dtype_of(book.options))
    with torch.device(book.options.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _time(book: Book, name: str, call: Callable[[], int]) -> float | None:
    """Tokens per second of the faster of two calls behind one that warms up; None: why is in the book."""
    key = f"throughput.{name}"
    if book.is_late(3.0):
        book.cannot(key, "no time left")
        return None
    rates = []
    try:
        for k in range(REPEATS + 1):
            began = time.perf_counter()
            tokens = call()
            if book.options.is_gpu:
                import torch

                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            if k or book.is_late(seconds):
                rates.append(tokens / seconds)
                book.row(engine=f"transformers {name}", tokens=tokens, seconds=seconds, call=k)
            if book.is_late(seconds):
                break
    except Exception as error:
        book.cannot(key, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        return None
    note = "one call, warming up included" if len(rates) == 1 else ""
    book.put(key, max(rates), low=min(rates), high=max(rates), note=note)
    return max(rates)


def _ratio(book: Book, ours: float, others: list[float | None]) -> None:
    known = [rate for rate in others if rate is not None]
    if not known:
        book.cannot("throughput.ratio", "transformers' generate gave no figure")
        return
    compiled = book.got.get("throughput.compiled")
    is_whole = compiled is not None and compiled.value is not None
    book.put("throughput.ratio", ours / max(known), note="" if is_whole else "without a compiled generate")
