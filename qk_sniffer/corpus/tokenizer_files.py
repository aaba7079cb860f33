"""Compares the files of a tokenizer with what transformers makes of them."""

import json
from pathlib import Path
from typing import Any

from qk_sniffer.errors import SourceError

_PROBE = "Hello world, it's  a test\n\nof 1234 words: d\u00e9j\u00e0 vu, \u6f22\u5b57; if x == y:"

_SHOWN_IDS = 8


def difference_from_file(tokenizer: Any, name: str, commit: str | None) -> str | None:
    """Returns how a loaded tokenizer splits a text otherwise than its own `tokenizer.json` says; None if it does not.

    A class of transformers may split texts by rules of its own, and take only the vocabulary from the file. If a
    repository names the wrong class, most tokens are wrong. Special tokens do not count.

    Args:
        name: the folder or the Hub id that the tokenizer was loaded from.
        commit: that of a Hub id.
    """
    from tokenizers import Tokenizer
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, "tokenizer.json", revision=commit, local_files_only=True)
        described = Tokenizer.from_file(str(path))
    except Exception:  # it has none, or one of an older format, which transformers has converted
        return None
    described.no_truncation()
    described.no_padding()
    try:
        says = described.encode(_PROBE, add_special_tokens=False).ids
        gives = tokenizer(_PROBE, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    except Exception:  # no token for a character: a text of the dataset that has it is an error
        return None
    if gives == says:
        return None
    at = next((at for at, (one, other) in enumerate(zip(gives, says, strict=False)) if one != other), 0)
    shown = (tokenizer.convert_ids_to_tokens(ids[at : at + _SHOWN_IDS]) for ids in (gives, says))
    return f"the tokens {next(shown)} of {_PROBE!r} would be {next(shown)}"


def refuse_files_elsewhere(folder: Path) -> None:
    """Refuses a tokenizer in `folder` of which transformers would read a file in another folder.

    The digest that identifies the tokenizer is of the files in its folder.
    """
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # there is none, or transformers reports it
        return
    named = settings.get("fast_tokenizer_files") if isinstance(settings, dict) else None
    for name in named if isinstance(named, list) else ():
        if not isinstance(name, str) or Path(name).name != name:
            raise SourceError(
                f"the tokenizer of {folder} names {name} in fast_tokenizer_files of tokenizer_config.json, which is "
                "not a file in its folder: copy the file there and name it without a folder"
            )
