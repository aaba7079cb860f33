"""Trains a small byte-level BPE tokenizer, and saves it in a folder as a checkpoint does."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def save_tokenizer(folder: Path, *, special: bool = True, vocabulary: int = 400, **options: Any) -> Path:
    """Saves a tokenizer that puts `<s>` (0) before and `</s>` (1) after a text, unless `special` is false.

    `options` are further entries of its `tokenizer_config.json`, such as `truncation_side`.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:10]], trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options).save_pretrained(
        folder
    )
    return folder
