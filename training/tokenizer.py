"""A byte-level BPE tokenizer trained on the data, by the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from training.data import Document

END = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", PAD)
SMALLEST = 256 + len(SPECIAL)  # all bytes are tokens, so that any text can be spelled


def train_tokenizer(documents: Iterable[Document], vocab_size: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; ids 0 to 6 are the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents if document.text), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
