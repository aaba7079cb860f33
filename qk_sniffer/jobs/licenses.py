"""Reads the licenses and languages that the cards of model and source state, for the card of the dataset."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qk_sniffer.corpus.dataset_cards import yaml_limited
from qk_sniffer.corpus.sources import PYDOC
from qk_sniffer.hub.checkpoint_links import home_of
from qk_sniffer.hub.client import reading_api
from qk_sniffer.hub.revisions import Kind
from qk_sniffer.store.files import open_inside
from qk_sniffer.store.stored import SMALL

if TYPE_CHECKING:
    from huggingface_hub import CardData

_CARD = "README.md"

_TIMEOUT_S = 10.0

_MOST_CHARACTERS, _MOST_ENTRIES = 200, 100
"""The largest names and lists that are taken from a card. The record of the job, which holds them, has limits too."""

_DOCUMENTATION = {"license": ["psf-2.0"], "language": ["en"]}


def stated_terms(kind: Kind, name: str, commit: str | None) -> dict[str, list[str]]:
    """Reads `license` and `language` of a Hub repository at `commit`, or of a local folder.

    Empty where they are not known: an error here must not end a job.
    """
    if kind == "dataset" and name == PYDOC:
        return _DOCUMENTATION
    try:
        card = _of_folder(kind, Path(name)) if Path(name).exists() else _of_hub(kind, name, commit)
    except Exception:
        card = None
    license, language = (_listed(card.get(key)) if card is not None else [] for key in ("license", "language"))
    return {"license": license, "language": [code for code in language if _is_language(code)]}


def _of_folder(kind: Kind, folder: Path) -> "CardData | None":
    from huggingface_hub import RepoCard

    # The license of a file elsewhere may be a line of a secret.
    home = home_of(folder, folder / _CARD) if kind == "model" else folder
    if home is None:
        return None
    with open_inside(home, _CARD) as file:
        card = file.read(SMALL + 1)
    # Parsing a large card takes minutes.
    if len(card) > SMALL:
        return None
    with yaml_limited(str(home / _CARD)):
        data: CardData = RepoCard(card.decode(), ignore_metadata_errors=True).data
    return data


def _of_hub(kind: Kind, name: str, commit: str | None) -> "CardData | None":
    info = reading_api().repo_info(name, repo_type=kind, revision=commit, timeout=_TIMEOUT_S)
    return getattr(info, "card_data", None)


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str) and len(each) <= _MOST_CHARACTERS][:_MOST_ENTRIES]


def _is_language(code: str) -> bool:
    # The Hub accepts ISO 639 codes with an optional region or script, and refuses a card with anything else.
    return re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", code) is not None
