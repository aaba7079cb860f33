"""A tiny checkpoint folder with a tokenizer, as a user would have one on disk."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import VOCAB, Case

ALPHABET = [chr(code) for code in range(33, 127)]
"""Printable ASCII but the space, which transformers' loader drops for some model types."""

assert len(ALPHABET) < VOCAB


def save_checkpoint(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The random model of `case` with a tokenizer of one token a character of `ALPHABET`, from 1; 0 is unknown."""
    case.model(dtype=dtype).save_pretrained(folder)
    vocabulary = {"<unk>": 0} | {character: number for number, character in enumerate(ALPHABET, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder
