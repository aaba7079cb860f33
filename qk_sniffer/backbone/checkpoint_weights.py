"""Finds the weight files of a checkpoint, reads their headers, and says why they cannot be loaded."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from qk_sniffer.backbone.damaged_files import damage, safetensors_header, shards_of
from qk_sniffer.config import AUTO, DTYPES
from qk_sniffer.errors import ConfigError, SourceError
from qk_sniffer.hub.checkpoint_files import INDEX, MODEL_WEIGHTS, PICKLE, WEIGHTS
from qk_sniffer.hub.json_files import DamagedFileError, json_object
from qk_sniffer.hub.lfs import refuse_pointer
from qk_sniffer.text import shortened

_VARIANT = r"model\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.([\w-]+)\.json"

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes of safetensors whose numbers are the values of weights, with their names in torch."""


def stored_dtypes(files: Iterable[Path]) -> dict[str, str]:
    """Returns the dtypes of the tensors in files of weights, by their names. Reads no weights.

    A dtype has the name that safetensors gives it, such as BF16 or F8_E4M3; those of pickles resemble it.

    Raises:
        DamagedFileError: a safetensors file is damaged.
    """
    dtypes: dict[str, str] = {}
    for path in files:
        if path.suffix == ".safetensors":
            dtypes |= {name: str(entry["dtype"]) for name, entry in safetensors_header(path).items()}
        else:
            dtypes |= _pickled_dtypes(path)
    return dtypes


def _pickled_dtypes(path: Path) -> dict[str, str]:
    try:
        weights = torch.load(path, map_location="meta", weights_only=True)
        tensors = {name: weight for name, weight in weights.items() if isinstance(weight, torch.Tensor)}
    except Exception:  # transformers reads it, or reports the error
        return {}
    names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return {name: dtype.replace("float", "f").replace("int", "i").upper() for name, dtype in names.items()}


def stored_shape(path: Path, name: str) -> list[int]:
    """Returns the shape of the tensor `name` of a file of weights. Reads no weights."""
    if path.suffix == ".safetensors":
        return list(safetensors_header(path)[name]["shape"])
    return list(torch.load(path, map_location="meta", weights_only=True)[name].shape)


def stored_bytes(path: Path, name: str) -> tuple[str, list[int], bytes]:
    """Returns the dtype, shape and bytes of the tensor `name` of a file of weights."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    else:
        tensor = torch.load(path, map_location="cpu", weights_only=True)[name]
    return str(tensor.dtype), list(tensor.shape), tensor.flatten().view(torch.uint8).numpy().tobytes()


def first_float(dtypes: Mapping[str, str]) -> str | None:
    """Returns the dtype of the first tensor of `stored_dtypes` whose numbers are its values; None if none is."""
    return next((FLOATS[dtype] for dtype in dtypes.values() if dtype in FLOATS), None)


def own_dtype(config: PretrainedConfig) -> str | None:
    """Returns the dtype that a checkpoint's config names; None if it names none."""
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def check_dtype(own: str | None) -> None:
    """Checks that models compute in a checkpoint's own dtype, if it is known.

    Raises:
        ConfigError: they do not.
    """
    if own is not None and own not in DTYPES:
        raise ConfigError([f"model.dtype is {AUTO}, and the checkpoint's own is {own}; valid: {', '.join(DTYPES)}"])


def weight_files(source: Mapping[str, Any], explicit: str | None = None) -> list[Path]:
    """Returns the weight files that transformers reads for the keyword arguments `source`, once they were read.

    `explicit` is the config's `transformers_weights`. A repository's files are those in the local cache.

    Raises:
        DamagedFileError: the index of the files is damaged.
    """
    top, find = _top_file(source, explicit)
    if top is not None and top.name.endswith(INDEX):
        return [shard for file in shards_of(top.read_bytes(), top.name) if (shard := find(file)) is not None]
    return [] if top is None else [top]


def damaged_file(source: Mapping[str, Any], explicit: str | None = None) -> str | None:
    """Returns what is wrong with the first damaged file among those of `weight_files` and their index; None without.

    Reads no weights.
    """
    top, find = _top_file(source, explicit)
    files = [] if top is None else [top]
    if top is not None and top.name.endswith(INDEX) and damage(top) is None:
        files = [shard for file in shards_of(top.read_bytes(), top.name) if (shard := find(file)) is not None]
    return next((_damaged(file.name, how) for file in files if (how := damage(file)) is not None), None)


def _damaged(file: str, how: str) -> str:
    return f"has a damaged file, {file}: {how}. Restore it, or download the model again (hf download)"


def _top_file(source: Mapping[str, Any], explicit: str | None) -> tuple[Path | None, Callable[[str], Path | None]]:
    """Returns the file of weights that transformers reads first, or their index, and what finds a file by its name."""
    where = {key: source[key] for key in ("revision",) if key in source}
    name = source["pretrained_model_name_or_path"]

    def find(file: str) -> Path | None:
        if Path(name).is_dir():
            path = Path(name, file)
            return path if path.is_file() else None
        found = cached_file(
            name,
            file,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **where,
        )
        return None if found is None else Path(found)

    for candidate in (explicit,) if explicit else MODEL_WEIGHTS:
        if (path := find(candidate)) is not None:
            return path, find
    return None, find


def config_problem(folder: Path) -> str | None:
    """Returns why a folder is no checkpoint, as far as the names of its files and its config.json tell; None if not."""
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" in names:
        try:
            json_object((folder / "config.json").read_bytes())
        except DamagedFileError as error:
            return _damaged("config.json", str(error))
        return None
    if not names:
        return "is an empty folder: give model.name a folder with config.json and weights, or org/name on the Hub"
    if files := [name for name in names if name.endswith(".gguf")]:
        return f"has no config.json, but GGUF files: set model.gguf_file to one of {shortened(files, 3)}"
    if deeper := sorted(path.parent.name for path in folder.glob("*/config.json")):
        return f"has no config.json: give model.name the path of one of its folders that has ({shortened(deeper, 3)})"
    return f"has no config.json, which every checkpoint has; in the folder are {shortened(names, 3)}"


def check_folder(folder: Path, explicit: str | None, *, allow_pickle: bool) -> None:
    """Checks that the checkpoint in `folder` has weights that can be loaded, as far as names and headers tell.

    Files that are not loaded may be pointers of Git LFS, or damaged.

    Raises:
        SourceError: names what is missing, what is there, or a file that is damaged or that Git LFS has not fetched,
            and the way out.
    """
    source = {"pretrained_model_name_or_path": str(folder)}
    for file in (folder / name for name in ((explicit,) if explicit else MODEL_WEIGHTS)):
        if file.is_file():
            refuse_pointer(file)
            break
    with suppress(DamagedFileError):  # an index, which is reported below
        for file in weight_files(source, explicit):
            refuse_pointer(file)
    names = {path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern)}
    problem = None
    if explicit is None or explicit not in names:
        problem = weights_problem(names, lambda name: (folder / name).read_bytes(), allow_pickle=allow_pickle)
    if problem := problem or damaged_file(source, explicit):
        raise SourceError(f"model {folder} {problem}")


@contextmanager
def pickles_refused(name: str) -> Iterator[None]:
    """Keeps transformers from loading a pickle within the block. What a checkpoint names may be of any format.

    Raises:
        SourceError: the checkpoint `name` has weights in one.
    """
    load = torch.load

    def refuse(file: Any, *_: Any, **__: Any) -> Any:
        raise SourceError(
            f"model {name} names a pickle among its weights ({Path(str(file)).name}), which can run any code when it "
            "is loaded: if you trust its author, set model.allow_pickle=true"
        )

    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = load


def weights_problem(names: Collection[str], read: Callable[[str], bytes], *, allow_pickle: bool) -> str | None:
    """Returns what keeps the weights among the files `names` of a checkpoint from being loaded; None if nothing does.

    `names` are relative to the checkpoint, and `read` returns the content of one of them.
    """
    for single in (WEIGHTS, PICKLE) if allow_pickle else (WEIGHTS,):
        if single in names:
            return None
        if single + INDEX in names:
            try:
                shards = shards_of(read(single + INDEX), single + INDEX)
            except DamagedFileError as error:
                return _damaged(single + INDEX, str(error))
            missing = [shard for shard in shards if shard not in names]
            if not missing:
                return None
            return (
                f"lacks {len(missing)} of the {len(shards)} files that its index {single}{INDEX} names: "
                f"{shortened(missing, 3)}. Restore them, or download the model again (hf download)"
            )
    top = sorted(name for name in names if "/" not in name)
    if shards := [name for name in top if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]:
        return (
            f"has {len(shards)} shards ({shortened(shards, 1)}), but not their index {WEIGHTS}{INDEX}: restore it, "
            "or download the model again (hf download)"
        )
    if variants := {name: match[1] or match[2] for name in top if (match := re.fullmatch(_VARIANT, name))}:
        file = next((name for name in variants if name.endswith(".json")), min(variants))
        plain = WEIGHTS + (INDEX if file.endswith(".json") else "")
        return (
            f"has weights of the variant {variants[file]} alone ({shortened(list(variants), 2)}), and transformers "
            f"reads them by their plain name: copy or link {file} to {plain}"
        )
    pickles = [name for name in top if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name)]
    if pickles and not allow_pickle:
        return (
            f"has no safetensors weights, but a pickle ({shortened(pickles, 2)}), which can run any code when it is "
            "loaded: if you trust its author, set model.allow_pickle=true"
        )
    if files := [name for name in top if name.endswith(".gguf")]:
        return f"has no weights but in GGUF files: set model.gguf_file to one of {shortened(files, 3)}"
    deeper = sorted({name.partition("/")[0] for name in names if re.search(rf"/{WEIGHTS}({INDEX})?$", name)})
    if deeper:
        return (
            f"has weights in its folders alone ({shortened(deeper, 3)}): give model.name the path of one that also has "
            "config.json"
        )
    others = [name for name in top if re.search(r"\.(safetensors|bin|pth|pt|ckpt|h5|msgpack|onnx|npz)$", name)]
    has = f"its weights have other names ({shortened(others, 3)})" if others else "it has no file of weights"
    needed = f"{WEIGHTS}, or {WEIGHTS}{INDEX} and the files that it names"
    return f"cannot be loaded: {has}. transformers reads {needed}"
