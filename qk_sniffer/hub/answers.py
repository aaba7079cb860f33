"""Checks the names in the answers of a Hub before huggingface_hub makes paths of them.

The library stores a file under the ETag of the answer, for the commit that the answer names, and checks neither.
Whoever answers in the place of the Hub could have it write new files anywhere on this machine.
"""

import re
from functools import wraps
from typing import Any, TypeGuard

from qk_sniffer.errors import HubError

_COMMIT = re.compile("[0-9a-f]{40}")

_FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\\0]{1,255}")


def is_commit(text: object) -> TypeGuard[str]:
    """Whether a value is a commit: a text of 40 hexadecimal digits."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def check_answers() -> None:
    """From here on, huggingface_hub takes no answer in this process that would lead out of its cache.

    Checked are answers about a file and about a repository. A call that gets another one raises a HubError.
    """
    from huggingface_hub import file_download as library
    from huggingface_hub import hf_api
    from huggingface_hub.errors import HfHubHTTPError

    if hasattr(library, _MARK):
        return
    ask, ask_or_look_up = library.get_hf_file_metadata, library._get_metadata_or_catch_error

    @wraps(ask)
    def asked(*arguments: Any, **options: Any) -> Any:
        try:
            found = ask(*arguments, **options)
        except HfHubHTTPError as error:  # the library remembers for this commit that it lacks the file
            _check(error.response.headers.get("X-Repo-Commit"), None)
            raise
        _check(found.commit_hash, found.etag)
        return found

    @wraps(ask_or_look_up)
    def looked_up(*arguments: Any, **options: Any) -> Any:
        found = ask_or_look_up(*arguments, **options)
        _, etag, commit, *_ = found  # of files in Xet, from a listing that the Hub gave earlier
        _check(commit, etag)
        return found

    library.get_hf_file_metadata, library._get_metadata_or_catch_error = asked, looked_up
    for kind in (hf_api.ModelInfo, hf_api.DatasetInfo):
        _check_commit_of(kind)
    setattr(library, _MARK, True)


_MARK = "_qk_sniffer_checks_answers"
"""An attribute of the module of huggingface_hub that is changed."""


def _check_commit_of(kind: Any) -> None:
    """Has the facts of a repository, of class `kind`, name no commit of another form.

    Libraries ask for further files at that commit: huggingface_hub makes a path of it, and datasets of its copy.
    """
    make = kind.__init__

    @wraps(make)
    def made(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        _check(self.sha, None)

    kind.__init__ = made


def _check(commit: str | None, etag: str | None) -> None:
    if commit is not None and not is_commit(commit):
        raise HubError(f"the Hub answers with {str(commit)[:100]!r} in the place of a commit, and no file is fetched")
    if etag is not None and _FILE_NAME.fullmatch(etag) is None:
        raise HubError(
            f"the Hub answers with the ETag {etag[:100]!r}, under which a file would be stored outside of the cache: "
            "it is not fetched"
        )
