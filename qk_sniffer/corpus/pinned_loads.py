"""Makes the load of a tokenizer read the files of its commit, and none of a cache that is found by a path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

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

    Args:
        name: the folder or the Hub id of the tokenizer.
        commit: that of a Hub id; None for a folder.
    """
    import transformers
    from transformers.utils import hub

    backend: Any = transformers.PreTrainedTokenizerFast
    with _lock:
        cached_files, cache = hub.cached_files, os.environ.get(_TIKTOKEN)

        def pinned(path_or_repo_id: Any, *args: Any, **options: Any) -> Any:
            if commit is not None and str(path_or_repo_id) == name and options.get("revision") is None:
                options["revision"] = commit
            return cached_files(path_or_repo_id, *args, **options)

        patch_regex = vars(backend)["_patch_mistral_regex"]

        def as_of_folder(cls: Any, tokenizer: Any, *args: Any, **options: Any) -> Any:
            return patch_regex.__func__(cls, tokenizer, *args, **options | {"is_local": True})

        hub.cached_files = pinned
        backend._patch_mistral_regex = classmethod(as_of_folder)
        os.environ[_TIKTOKEN] = ""  # the package reads "" as: no cache
        try:
            yield
        finally:
            hub.cached_files = cached_files
            backend._patch_mistral_regex = patch_regex
            if cache is None:
                del os.environ[_TIKTOKEN]
            else:
                os.environ[_TIKTOKEN] = cache
