"""The byte-level BPE tokenizer that all tiny members share: 1,024 entries, digits one by one."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from heliosim.tasks import FAMILIES, documents

VOCABULARY = 1024
POSITIONS = 512
PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2
DOCUMENTS_PER_FAMILY = 2000
SEED = 11


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train on the same number of training documents of each family."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        document.text
        for family in FAMILIES
        for document in islice(documents(family, "train", SEED), DOCUMENTS_PER_FAMILY)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def shared_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of any member under `out`; trained afresh (the same one) where there is none yet."""
    kept = sorted(path.parent for path in out.glob("*/tokenizer.json"))
    return load_tokenizer(kept[0]) if kept else train_tokenizer()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint folder, without any network."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
