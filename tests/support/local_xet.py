"""Xet storage without a network: hf_xet keeps what it uploads in a folder when its server's address is `local://folder`.

The Hub learns from Xet which content it stores under which hash. Here that is read from the shards in the folder, whose
format (huggingface/xet-core, MDB shards) is: a header of 48 bytes, then entries of 48 bytes. A file has an entry with
its hash, flags and the number of its segments; an entry for each segment; as many more with the first flag; and with
the second flag one that holds its sha256. An entry of 32 bytes 0xff begins the end.
"""

import struct
import tempfile
from pathlib import Path

_HEADER = _ENTRY = 48
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30


class LocalXet:
    def __init__(self, folder: Path) -> None:
        self.url = f"local://{folder.resolve()}"
        self._shards = folder / "xet" / "xorbs" / "shards"

    def hashes(self) -> dict[str, str]:
        """The Xet hash of every stored file by its sha256."""
        found: dict[str, str] = {}
        for shard in self._shards.glob("*.mdb"):
            found |= _files(shard.read_bytes())
        return found

    def content(self, sha256: str, size: int) -> bytes:
        """A stored file, fetched as a client would."""
        import hf_xet

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "file")
            with hf_xet.XetSession().new_file_download_group(
                endpoint=self.url, token="", token_expiry_unix_secs=2**40
            ) as g:
                g.start_download_file(hf_xet.XetFileInfo(self.hashes()[sha256], size), str(target))
            return target.read_bytes()


def _files(shard: bytes) -> dict[str, str]:
    found, at = {}, _HEADER
    while shard[at : at + 32] != b"\xff" * 32:
        name = _hex(shard[at : at + 32])
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        at += _ENTRY * (1 + segments * (2 if flags & _WITH_VERIFICATION else 1))
        if flags & _WITH_METADATA:
            found[_hex(shard[at : at + 32])] = name
            at += _ENTRY
    return found


def _hex(raw: bytes) -> str:
    """Xet prints a hash as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
