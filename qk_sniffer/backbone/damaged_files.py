"""Says what is wrong with a file of weights that is damaged, as far as its size, its header or its index tells.

A download that broke off leaves a file that is too short. The libraries that read it do not name it.
"""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from qk_sniffer.hub.json_files import DamagedFileError, json_object
from qk_sniffer.text import counted, is_possible, leads_out, shortened

_LENGTH_BYTES = 8
"""The bytes of the length of a header, with which a safetensors file begins."""

_LONGEST_HEADER = 2**30


def safetensors_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file: the entry of each tensor, by its name. Reads no weights.

    Raises:
        DamagedFileError: the file is no safetensors file, or it has more or fewer bytes than its header says.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        content = file.read(min(length, _LONGEST_HEADER))
    if size < _LENGTH_BYTES or (len(content) < length and content.startswith(b"{")):
        raise DamagedFileError(f"it ends in its header, after {size:,} bytes")
    try:
        header = json.loads(content)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        raise DamagedFileError("it is not a safetensors file") from None
    whole = _LENGTH_BYTES + length + max(ends, default=0)
    if size != whole:
        raise DamagedFileError(f"it has {size:,} bytes, and its header says {whole:,}")
    return entries


def shards_of(index: bytes, name: str) -> list[str]:
    """Returns the files that an index of weights names. `name` is its own.

    Raises:
        DamagedFileError: it names no files, or files outside of the folder that it is in, or names that no file has.
            An index of safetensors files names another file, which would be loaded as a pickle.
    """
    found = json_object(index)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict):
        raise DamagedFileError("it has no weight_map, which names the file of each weight")
    shards = list(weight_map.values())
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise DamagedFileError("its weight_map does not name the file of each weight")
    shards = sorted(set(shards))
    if outside := [shard for shard in shards if leads_out(shard)]:
        raise DamagedFileError(
            f"it names {len(outside)} files outside of its folder, which are not read: {shortened(outside, 2)}"
        )
    if impossible := [shard for shard in shards if not is_possible(shard)]:
        number = counted(len(impossible), "file")
        raise DamagedFileError(f"it names {number} as no disk can, such as {impossible[0][:60]!r}")
    others = [shard for shard in shards if not shard.endswith(".safetensors")]
    if others and name.endswith(".safetensors.index.json"):
        raise DamagedFileError(
            f"it names {counted(len(others), 'file')} of other formats than safetensors ({shortened(others, 2)}), and "
            "such a file can run any code when it is loaded"
        )
    return shards


def damage(path: Path) -> str | None:
    """Returns how a file of weights is damaged; None if it is whole, or of a format that is not known here."""
    try:
        if path.suffix == ".safetensors":
            safetensors_header(path)
        elif path.name.endswith(".index.json"):
            shards_of(path.read_bytes(), path.name)
        elif path.suffix == ".gguf":
            return _damage_of_gguf(path)
        elif path.suffix == ".bin":
            return _damage_of_pickle(path)
    except DamagedFileError as error:
        return str(error)
    return None


def _damage_of_pickle(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "it is empty"
    return "its end is missing" if start == b"PK" and not zipfile.is_zipfile(path) else None


def _damage_of_gguf(path: Path) -> str | None:
    from transformers.integrations.gguf.reader import GgufHeader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return "it is not a GGUF file"
    size = path.stat().st_size
    try:
        header = GgufHeader.from_file(str(path))
    except (struct.error, IndexError):  # the reader has passed the end
        return f"it ends in its header, after {size:,} bytes"
    except Exception:  # of a version or type that the loader names
        return None
    whole = header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    return f"it has {size:,} bytes, and its header says {whole:,}" if size < whole else None
