"""Saves tiny checkpoint folders, with a tokenizer as a user has it on disk."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qk_sniffer.config import ModelConfig
from support.zoo import VOCAB, Case

ALPHABET = [chr(code) for code in range(33, 127)]
"""Printable ASCII without the space, which transformers' loader drops for some model types."""

assert len(ALPHABET) < VOCAB

CUT: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""Config fields of a model that is built in an instant."""


def save_checkpoint(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves the random model of `case` with a tokenizer: a token for each character of `ALPHABET` from 1, 0 unknown."""
    case.model(dtype=dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Saves the tokenizer of `save_checkpoint`."""
    vocabulary = {"<unk>": 0} | {character: number for number, character in enumerate(ALPHABET, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def saved(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> ModelConfig:
    """Saves the random model of `case` without a tokenizer; returns the config that loads it."""
    case.model(dtype=dtype).save_pretrained(folder)
    return ModelConfig(name=str(folder), dtype=str(dtype).removeprefix("torch."))
