"""Checks the files of a tokenizer: what transformers would open for them, and what it makes of them."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from qk_sniffer.corpus.panics import panics_as_errors
from qk_sniffer.corpus.text_growth import MOST_GROWTH, PARTS, growth
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.config_limits import refuse_large_config, refuse_other_configs, refuse_too_many_layers
from qk_sniffer.hub.gguf_header import LONGEST_TOKEN
from qk_sniffer.hub.json_files import DamagedFileError, json_object
from qk_sniffer.store.disk import real_path
from qk_sniffer.text import leads_out

_PROBE = "Hello world, it's  a test\n\nof 1234 words: d\u00e9j\u00e0 vu, \u6f22\u5b57; if x == y:"

_PROBES = 4
"""How often the text is split to see whether the tokens differ."""

_SHOWN_IDS = 8

_SHOWN_CHARACTERS = 200

_SETTINGS = "tokenizer_config.json"

_SPECIAL_TOKENS = "special_tokens_map.json"

_VOCABULARIES = ("vocab", "merges", "entity_vocab")
"""Arguments of tokenizers that hold a vocabulary, or the name of its file."""

_WAYS_TO_LOAD = ("gguf_file", "subfolder", "cache_dir", "revision", "repo_type", "token", "proxies")
"""Arguments of loaders: transformers takes them from the files of a tokenizer as if its caller had given them."""

_SET_BY_LOADER = ("name_or_path", "is_local", "local_files_only")
"""Arguments that transformers sets itself after it reads tokenizer_config.json and before special_tokens_map.json."""

_OPTIONS = ("mecab_kwargs", "sudachi_kwargs", "sp_model_kwargs")
"""Keys that hold arguments of the libraries below a tokenizer."""

_OPENED_BELOW = ("mecab_option", "sudachi_config_path", "sudachi_resource_dir", "model_file")
"""Arguments of these libraries that name files. So may others, such as the type of a dictionary of Sudachi."""

_LIBRARIES = ("sentencepiece", "tiktoken", "mistral_common", "fugashi", "sudachipy", "rhoknp", "rjieba", "sacremoses")
"""The packages that read vocabularies or split texts for tokenizers of transformers, by the names of their modules."""

_DESCRIPTION = re.compile(r"tokenizer(\.[0-9]+(\.[0-9a-z]+)*)?\.json", flags=re.ASCII)
"""The names of files that describe a tokenizer, such as tokenizer.json and tokenizer.4.0.0.json."""

_BYTE_MAPS = "byte_maps.json"
"""The vocabulary of MyT5."""

_MAPS = ("decompose_map", "merge_map")
"""Its maps. transformers opens the file that a string names in the place of one."""

_ADDED = "added_tokens_decoder"
"""Tokens by their ids. transformers fills the gap between the ids of a vocabulary and the largest one."""

LARGEST_ID = 4_000_000
"""The largest id of an added token. The largest vocabularies have some 300,000 tokens."""

_NEVER_OPENED = ("tokenizer_file", "special_tokens_map_file", "added_tokens_file", "tokenizer_config_file")
"""Keys of tokenizer_config.json that published tokenizers have, and that transformers replaces by its own files."""


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
        with panics_as_errors():
            described = Tokenizer.from_file(str(path))
    except Exception:  # it has none, or one of an older format, which transformers has converted
        return None
    described.no_truncation()
    described.no_padding()
    if getattr(described.model, "dropout", None):  # the loaded tokenizer has none: see `randomness_of`
        described.model.dropout = None
    try:
        with panics_as_errors():
            says = described.encode(_PROBE, add_special_tokens=False).ids
            gives = tokenizer(_PROBE, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    except Exception:  # no token for a character: a text of the dataset that has it is an error
        return None
    if gives == says:
        return None
    at = next((at for at, (one, other) in enumerate(zip(gives, says, strict=False)) if one != other), 0)
    shown = (tokenizer.convert_ids_to_tokens(ids[at : at + _SHOWN_IDS]) for ids in (gives, says))
    return f"the tokens {next(shown)} of {_PROBE!r} would be {next(shown)}"


def libraries_of(tokenizer: Any, name: str, commit: str | None) -> list[str]:
    """Returns the packages that split the texts of a loaded tokenizer, or have read its vocabulary, but `tokenizers`.

    Of the packages that transformers uses in this way, they are those that this process has imported. A tokenizer that
    its `tokenizer.json` describes needs none. `name` and `commit` are those of `difference_from_file`.
    """
    from transformers.utils.hub import cached_file

    where: dict[str, Any] = {"revision": commit, "local_files_only": True}
    if getattr(tokenizer, "is_fast", False) and cached_file(
        name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **where
    ):
        return []
    return [library for library in _LIBRARIES if library in sys.modules]


def randomness_of(tokenizer: Any) -> str | None:
    """Returns why a loaded tokenizer may split a text differently each time; None if it does not.

    Training draws among several ways to split a text. A tokenizer that was saved with this setting still does.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        return f"model.dropout of its tokenizer.json is {dropout:.3g}"
    # No file of a tokenizer holds these two, but code of a checkpoint may set them.
    alpha, nbest_size = (getattr(model, name, None) for name in ("alpha", "nbest_size"))
    if alpha is not None and nbest_size != 1:
        return f"alpha and nbest_size of its Unigram model are {alpha:.3g} and {nbest_size}"
    if (getattr(tokenizer, "sp_model_kwargs", None) or {}).get("enable_sampling"):
        return f"sp_model_kwargs.enable_sampling of its {_SETTINGS} is true"
    try:
        with panics_as_errors():
            several = [tokenizer(_PROBE, truncation=False, verbose=False)["input_ids"] for _ in range(_PROBES)]
    except Exception:  # no token for a character: a text of the dataset that has it is an error
        return None
    return f"{_PROBE!r} gives other tokens the second time" if several.count(several[0]) < _PROBES else None


def refuse_files_elsewhere(name: str, *, trust_remote_code: bool = False, **options: Any) -> None:
    """Refuses a tokenizer of which transformers would read a file that is not in its folder or Hub repository.

    The digest or the commit that identifies the tokenizer covers only the files there. Where a vocabulary is expected,
    `tokenizers` opens the file that a string names: a repository could make any text of this machine the vocabulary.
    Other keys decide where transformers looks for files, and in which folder it writes downloads.

    Args:
        name: the folder, the file or the Hub id that the tokenizer is loaded from.
        trust_remote_code: the code of the repository may read any file and define keys of its own: only
            `configuration_files` and `fast_tokenizer_files` are checked.
        options: `revision` and `local_files_only` of a Hub id.

    Raises:
        SourceError: a file of the tokenizer names such a file or a way to load, or a class that is no tokenizer, or
            makes texts too long; or its config or that of its model, which transformers loads too, is too large, has
            too many layers or stands for another one.
        OSError: the Hub does not give a file of the tokenizer.
    """
    if (file_of_model := _file_of(name, "config.json", options)) is not None:
        refuse_other_configs(file_of_model)
    config = _read_object(file_of_model)
    refuse_too_many_layers(f"the config.json of {name}", config)
    settings = _read_object(_file_of(name, _SETTINGS, options))
    listed = settings.get("fast_tokenizer_files")
    described = listed if isinstance(listed, list) else []
    for file in described:
        if not isinstance(file, str) or not _DESCRIPTION.fullmatch(file):
            raise SourceError(
                f"the tokenizer of {name} names {file} in fast_tokenizer_files of {_SETTINGS}, which is not the name "
                "of a file such as tokenizer.json or tokenizer.4.0.0.json in its folder: copy the file there and give "
                "it such a name"
            )
    if trust_remote_code:
        return
    _refuse_other_classes(name, settings, config)
    for key, value in settings.items():
        _refuse_way_to_load(name, _SETTINGS, key, value)
        _refuse_costly(name, _SETTINGS, key, value)
        if _holds_path(key, value) or (key.endswith("_file") and key not in _NEVER_OPENED and _exists(name, value)):
            _refuse(name, _SETTINGS, key, value)
    for key, value in _read_object(_file_of(name, _SPECIAL_TOKENS, options)).items():
        _refuse_way_to_load(name, _SPECIAL_TOKENS, key, value)
        _refuse_costly(name, _SPECIAL_TOKENS, key, value)
        if _holds_path(key, value) or (key.endswith(("_file", "_spm")) and isinstance(value, str)):
            _refuse(name, _SPECIAL_TOKENS, key, value)
    byte_maps = _read_object(_file_of(name, _BYTE_MAPS, options))
    for key in _MAPS:
        if isinstance(value := byte_maps.get(key), str):
            _refuse(name, _BYTE_MAPS, key, value)
    for file in dict.fromkeys(("tokenizer.json", *described)):
        described_here = _read_object(_file_of(name, file, options))
        refuse_growth(name, described_here, file)
        model = described_here.get("model")
        for key, value in model.items() if isinstance(model, dict) else ():
            if _holds_path(key, value):
                _refuse(name, file, f"model.{key}", value)


def steps_of(tokenizer: Any) -> dict[str, Any]:
    """Returns the steps of a loaded tokenizer around its model, as a `tokenizer.json` has them; none if not known.

    transformers makes some of them itself, from files of other formats.
    """
    backend, found = getattr(tokenizer, "backend_tokenizer", None), {}
    for key in PARTS:
        with suppress(Exception):  # code of a checkpoint may have a step of its own, which is no data
            found[key] = json.loads(getattr(backend, key).__getstate__())
    return found


def refuse_growth(name: str, described: Mapping[str, Any], file: str | None = None) -> None:
    """Checks that the tokenizer of `name` does not make texts much longer. `described` is as its `tokenizer.json`.

    `file` is the one that describes it; None if it is the loaded tokenizer that is described.

    Raises:
        SourceError: it does.
    """
    if growth(described) > MOST_GROWTH:
        parts = "normalizer, pre_tokenizer or post_processor" + ("" if file is None else f" of its {file}")
        raise SourceError(
            f"the tokenizer of {name} is refused: the {parts} may make a text more than {MOST_GROWTH:,} times longer, "
            "which would fill the memory. Set model.tokenizer.name to another tokenizer"
        )


def _holds_path(key: str, value: Any) -> bool:
    """Whether the value of a key is a string, or has one, where tokenizers would open the file of this name."""
    if key == "init_inputs":  # arguments by position, the first of which is the vocabulary
        return isinstance(value, str) or (isinstance(value, list) and any(isinstance(item, str) for item in value))
    return key in _VOCABULARIES and isinstance(value, str)


def _exists(name: str, value: Any) -> bool:
    """Whether `value` is the path of a file or a device that is not one of the folder `name`.

    Published tokenizers have paths of the machine that saved them, which transformers replaces for most keys.
    """
    if not isinstance(value, str):
        return False
    try:
        path = Path(value)
        return path.exists() and not path.is_dir() and not real_path(path).is_relative_to(real_path(Path(name)))
    except StoreError:  # links lead over a path that is too long, and may lead anywhere from there
        return True
    except (OSError, ValueError, RuntimeError):  # no path: too long, with a null character, or a loop of links
        return False


def _refuse_way_to_load(name: str, file: str, key: str, value: Any) -> None:
    """Checks that a key of `file` does not say from where to load, or names a file to a library below."""
    if (key in _WAYS_TO_LOAD and value) or (key in _SET_BY_LOADER and file == _SPECIAL_TOKENS):
        raise SourceError(
            f"the tokenizer of {name} is refused: {key} of its {file} is {_shown(value)}, which would decide where "
            f"transformers reads and writes files. Remove {key} from {file}, or set model.tokenizer.name to another "
            "tokenizer"
        )
    for option, given in value.items() if key in _OPTIONS and isinstance(value, dict) else ():
        if given and (option in _OPENED_BELOW or (isinstance(given, str) and leads_out(given))):
            _refuse(name, file, f"{key}.{option}", given)


def _refuse_costly(name: str, file: str, key: str, value: Any) -> None:
    """Checks that a key of `file` does not make transformers fill the memory, or split a token in too many ways."""
    if not isinstance(value, dict):
        return
    problem = None
    if key == _ADDED and (largest := max(map(_as_id, value), default=0)) > LARGEST_ID:
        problem = f"has the id {largest:,}"
    elif key in _VOCABULARIES and (longest := max(map(len, value), default=0)) > LONGEST_TOKEN:
        problem = f"has a token of {longest:,} characters"
    if problem is not None:
        raise SourceError(
            f"the tokenizer of {name} is refused: {key} of its {file} {problem}, which would fill the memory or take "
            "hours. Restore the file, or set model.tokenizer.name to another tokenizer"
        )


def _as_id(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # transformers refuses it too
        return 0


def _refuse_other_classes(name: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks the classes that transformers may load the tokenizer with.

    It takes the name of any class of its own. One that is no tokenizer does not take over the commit, and whether code
    of the repository may run: a `RagTokenizer` loads two tokenizers from folders that no check has seen.

    Raises:
        SourceError: a class is no tokenizer.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto import tokenization_auto
    from transformers.utils.import_utils import DummyObject

    for named in dict.fromkeys([settings.get("tokenizer_class"), *_classes_of(config)]):
        found = tokenization_auto.tokenizer_class_from_name(named) if isinstance(named, str) else None
        # A dummy stands for a tokenizer whose library is not installed. transformers says so.
        if found is None or isinstance(found, DummyObject):
            continue
        if not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
            raise SourceError(
                f"the tokenizer of {name} is refused: its files name the class {named}, which is not a single "
                "tokenizer. Set model.tokenizer.name to the folder of one tokenizer, such as "
                "question_encoder_tokenizer of a RAG model, or to another tokenizer"
            )


def _classes_of(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the classes of tokenizers that a config and those in it name, and those of their types of models."""
    from transformers.models.auto import tokenization_auto

    yield config.get("tokenizer_class")
    if isinstance(kind := config.get("model_type"), str):
        yield tokenization_auto.TOKENIZER_MAPPING_NAMES.get(kind)
    for value in config.values():
        if isinstance(value, dict):
            yield from _classes_of(value)


def _refuse(name: str, file: str, key: str, value: Any) -> NoReturn:
    raise SourceError(
        f"the tokenizer of {name} is refused: {key} of its {file} is {_shown(value)}, which transformers would open "
        f"as a file of this machine. Remove {key} from {file}, or set model.tokenizer.name to another tokenizer"
    )


def _shown(value: Any) -> str:
    return repr(value if len(str(value)) <= _SHOWN_CHARACTERS else f"{str(value)[:_SHOWN_CHARACTERS]}...")


def _file_of(name: str, file: str, options: dict[str, Any]) -> Path | None:
    """Returns the path of a file of the tokenizer as transformers finds it; None if the tokenizer has no such file."""
    from transformers.utils.hub import cached_file

    if Path(name).is_file():
        return Path(name) if file in ("tokenizer.json", _BYTE_MAPS) and name.endswith(".json") else None
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    if found is None:
        return None
    refuse_large_config(Path(found))
    return Path(found)


def _read_object(path: Path | None) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if there is none, which transformers reports."""
    if path is None:
        return {}
    try:
        return json_object(path.read_bytes())
    except (OSError, DamagedFileError):
        return {}
