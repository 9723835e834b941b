"""Command line: `python -m calibrate.tiny all | tokenizer | train NAME | heads NAME | premises`."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

# Offline by design: nothing here needs a hub, and each process uses one thread.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from heliosim import tasks

from . import heads, premises
from . import tokenizer as bpe
from .train import RECIPES, train

CHECKPOINTS = Path(tasks.__file__).resolve().parent / "checkpoints"


def main() -> None:
    """Parse the arguments and do the work."""
    arguments = _parser().parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", filename=arguments.log, datefmt="%H:%M:%S"
    )
    out: Path = arguments.out
    if arguments.work == "tokenizer":
        bpe.save_tokenizer(bpe.train_tokenizer(), out / "tokenizer")
    names = {"all": list(RECIPES), "train": [arguments.name], "heads": [arguments.name]}.get(arguments.work, [])
    for name in names:
        if arguments.work in ("train", "all"):
            train(RECIPES[name], out, steps=arguments.steps, minutes=arguments.minutes)
        if arguments.work == "heads" or (arguments.work == "all" and RECIPES[name].kind == "fixed"):
            heads.train_heads(RECIPES[name], out, steps=arguments.steps or heads.STEPS, minutes=arguments.minutes)
    if arguments.work in ("premises", "all"):
        print(premises.report(out))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m calibrate.tiny", description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder of the checkpoint folders")
    parser.add_argument("--log", type=Path, default=None, help="write progress to this file, not to the terminal")
    parser.set_defaults(name=None, steps=None, minutes=None)
    works = parser.add_subparsers(dest="work", required=True)
    every = works.add_parser("all", help="four backbones, heads, premises: about an hour on one thread")
    every.add_argument("--steps", type=int, help="for a trial run: the same number of steps for all")
    works.add_parser("tokenizer", help="train the shared tokenizer alone (training does it where no member has one)")
    for work, names in (
        ("train", list(RECIPES)),
        ("heads", [n for n, r in RECIPES.items() if r.kind == "fixed"]),
    ):
        one = works.add_parser(work, help=f"{work} of one member")
        one.add_argument("name", choices=names)
        one.add_argument("--steps", type=int, help="other than the recipe says")
        one.add_argument("--minutes", type=float, help="time limit; the learning rate falls in time for it")
    works.add_parser("premises", help="measure the premises and write the tables of the model card")
    return parser


if __name__ == "__main__":
    main()
