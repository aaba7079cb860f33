"""Makes the load of a tokenizer read the files of its commit, checked ones, and none of a cache found by a path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from qk_sniffer.corpus.vocabulary_files import refuse_long_tokens

_lock = RLock()
"""Held while the library and the environment differ."""

_TIKTOKEN = "TIKTOKEN_CACHE_DIR"


@contextmanager
def pinned_loads(name: str, commit: str | None) -> Iterator[None]:
    """Within it, transformers loads the files of `name` at `commit`, and tiktoken has no cache. One thread at a time.

    transformers does not pass the revision on to all places that load a file, such as the vocabulary of a GGUF file:
    these read the default branch. tiktoken copies a local vocabulary to the folder of temporary files, and reads the
    copy of any earlier file of the same path instead of the file. Whether `fix_mistral_regex` of a tokenizer is
    obeyed depends on the tags that its repository has on the Hub today, or without the Hub on its config. Within this
    block it depends on the config alone, as it does for a local folder.

    Only transformers knows which files it reads as vocabularies. They are checked when it has found them: where every
    tokenizer is made of its files, and where the package mistral_common is given one, which transformers chooses for
    `tekken.json` if it is installed.

    Args:
        name: the folder or the Hub id of the tokenizer.
        commit: that of a Hub id; None for a folder.

    Raises:
        SourceError: from the load within the block, if a vocabulary has tokens that are too long.
    """
    import transformers
    from transformers.utils import hub

    backend: Any = transformers.PreTrainedTokenizerFast
    base: Any = transformers.PreTrainedTokenizerBase
    with _lock:
        cached_files, cache = hub.cached_files, os.environ.get(_TIKTOKEN)

        def pinned(path_or_repo_id: Any, *args: Any, **options: Any) -> Any:
            if commit is not None and str(path_or_repo_id) == name and options.get("revision") is None:
                options["revision"] = commit
            return cached_files(path_or_repo_id, *args, **options)

        patch_regex = vars(backend)["_patch_mistral_regex"]

        def as_of_folder(cls: Any, tokenizer: Any, *args: Any, **options: Any) -> Any:
            return patch_regex.__func__(cls, tokenizer, *args, **options | {"is_local": True})

        load = vars(base)["_from_pretrained"]

        def checked(cls: Any, files: dict[str, Any], *args: Any, **options: Any) -> Any:
            for path in filter(None, files.values()):
                refuse_long_tokens(Path(path))
            return load.__func__(cls, files, *args, **options)

        hub.cached_files = pinned
        backend._patch_mistral_regex = classmethod(as_of_folder)
        base._from_pretrained = classmethod(checked)
        os.environ[_TIKTOKEN] = ""  # the package reads "" as: no cache
        try:
            with _checked_by_mistral():
                yield
        finally:
            hub.cached_files = cached_files
            backend._patch_mistral_regex = patch_regex
            base._from_pretrained = load
            if cache is None:
                del os.environ[_TIKTOKEN]
            else:
                os.environ[_TIKTOKEN] = cache


@contextmanager
def _checked_by_mistral() -> Iterator[None]:
    """Checks the vocabularies that the package mistral_common reads, if it is installed."""
    from transformers.utils import import_utils

    if not import_utils.is_mistral_common_available():
        yield
        return
    from transformers.tokenization_mistral_common import MistralCommonBackend

    backend: Any = MistralCommonBackend
    make = backend.__init__

    def made_of_checked(self: Any, tokenizer_path: Any, *args: Any, **options: Any) -> None:
        refuse_long_tokens(Path(tokenizer_path))
        make(self, tokenizer_path, *args, **options)

    backend.__init__ = made_of_checked
    try:
        yield
    finally:
        backend.__init__ = make
