"""Damages files at random, by a seed: JSON by its structure, any file by its bytes, and by what is at its path."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from qk_sniffer.store import stored

_DEEP: Any = 0
for _ in range(60):
    _DEEP = [_DEEP]


def odd_values(outside: Path) -> list[Any]:
    """Returns values that a hostile or damaged file may hold. `outside` must not be touched."""
    numbers = [-1, 0, 1, 7, 10**9, 1e9, 10**30, 10**400, 1e300, -(2**63), 2**53, 0.5, float("nan"), float("inf"), -0.0]
    texts = ["", "x", "../../outside/file", str(outside / "file"), "/dev/zero", "${oc.env:HF_TOKEN}", "\x1b[31m\u202e"]
    return [None, True, *numbers, *texts, "\ud800", "a\0b", "y" * 20_000, [], {}, _DEEP, {"a": [1, None]}]


class Editor:
    """Makes one edit, which follows from `seed`; `what` describes it.

    `is_signed` says that the digest in the file is right all the same.
    """

    def __init__(self, seed: str, outside: Path) -> None:
        self.random = random.Random(seed)
        self.outside = outside
        self.what = ""
        self.is_signed = False

    def edit(self, path: Path) -> None:
        """Edits the file at `path`."""
        kinds = [self._bytes, self._node]
        if path.suffix in (".json", ".done", ".progress", ".lock"):
            kinds += [self._json] * 6
        elif path.suffix == ".safetensors":
            kinds += [self._segment] * 6
        kind = self.random.choice(kinds)
        kind(path)

    def _json(self, path: Path) -> None:
        try:
            values = json.loads(path.read_bytes())
        except ValueError:  # it holds a digest alone
            return self._bytes(path)
        edited = self.edited(values)
        if isinstance(edited, dict) and "sha256" in edited and self.random.random() < 0.5:
            # As someone would who knows the format.
            self.is_signed = True
            edited["sha256"] = stored.digest({key: value for key, value in edited.items() if key != "sha256"})
        path.write_text(json.dumps(edited), encoding="utf-8")
        return None

    def _segment(self, path: Path) -> None:
        """Edits the header of a segment, and names the file by the checksum of the result."""
        self.is_signed = True
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        metadata = entries["__metadata__"]
        if self.random.random() < 0.5:
            key = self.random.choice(sorted(metadata))
            try:
                metadata[key] = json.dumps(self.edited(json.loads(metadata[key])))
            except ValueError:
                entries = self.edited(entries)
        else:
            entries = self.edited(entries)
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        whole = len(header).to_bytes(8, "little") + header + data[8 + length :]
        path.unlink()
        number = path.name.partition("-")[0]
        path.with_name(f"{number}-{xxhash.xxh3_64_hexdigest(whole)}.safetensors").write_bytes(whole)

    def edited(self, values: Any) -> Any:
        """Returns `values` with one change somewhere."""
        places: list[tuple[Any, Any]] = []

        def visit(value: Any) -> None:
            for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
                places.append((value, key))
                visit(value[key])

        visit(values)
        if not places or self.random.random() < 0.03:
            self.what = "the whole is replaced"
            return self.random.choice(odd_values(self.outside))
        above, key = self.random.choice(places)
        old = above[key]
        change = self.random.choice(("odd", "odd", "odd", "delete", "type", "number", "rename", "more"))
        if change == "delete":
            del above[key]
        elif change == "type":
            above[key] = self.random.choice([[old], {"a": old}, str(old), None])
        elif change == "number" and isinstance(old, int | float) and not isinstance(old, bool):
            above[key] = self.random.choice([old + 1, -old, old * 10**6, float(old), old - 1])
        elif change == "rename" and isinstance(above, dict):
            above[self.random.choice(["../x", "", "new", f"{key} "])] = above.pop(key)
        elif change == "more":
            if isinstance(above, dict):
                above["unknown"] = self.random.choice(odd_values(self.outside))
            else:
                above.append(old)
        else:
            above[key] = self.random.choice(odd_values(self.outside))
        self.what = (
            f"{change} at {key!r}: {str(old)[:60]!r} -> {str(above.get(key) if isinstance(above, dict) else '')[:60]!r}"
        )
        return values

    def _bytes(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        at = self.random.randrange(max(1, len(data)))
        change = self.random.choice(("flip", "flip", "cut", "empty", "append"))
        self.what = f"{change} at byte {at} of {len(data)}"
        if change == "flip" and data:
            data[at] ^= 1 << self.random.randrange(8)
        elif change == "cut":
            del data[at:]
        elif change == "empty":
            data.clear()
        else:
            data += b"\0more"
        path.write_bytes(data)

    def _node(self, path: Path) -> None:
        def link(target: Path | str) -> Callable[[], None]:
            return lambda: path.symlink_to(target)

        changes: dict[str, Callable[[], object]] = {
            "removed": lambda: None,
            "a folder": path.mkdir,
            "a full folder": lambda: (path.mkdir(), (path / "file").write_text("x")),
            "a link to a file outside": link(self.outside / "file"),
            "a link to a folder outside": link(self.outside),
            "a link to itself": link(path.name),
            "a link to nothing": link("none"),
            "a link to /dev/zero": link("/dev/zero"),
            "a pipe": lambda: os.mkfifo(path),
        }
        self.what = self.random.choice(sorted(changes))
        path.unlink()
        changes[self.what]()


def copied(state: Path, root: Path) -> None:
    """Replaces the folder `root` by a copy of `state`."""
    if root.is_symlink() or root.exists():
        shutil.rmtree(root)
    shutil.copytree(state, root, symlinks=True)
