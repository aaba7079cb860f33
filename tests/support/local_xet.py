"""Stores uploads through Xet without a network: hf_xet writes to a folder if its server is `local://folder`.

The real Hub learns from Xet which content has which hash. This module reads the hashes from the shards in the folder.
Their format (huggingface/xet-core, MDB shards) is a header of 48 bytes, then entries of 48 bytes. A file has one entry
with its hash, flags and number of segments, and one entry for each segment. The first flag doubles the segment entries.
The second flag adds an entry with the sha256. An entry that starts with 32 bytes 0xff ends the files.
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
        """Returns the Xet hash of each stored file by its sha256."""
        found: dict[str, str] = {}
        for shard in self._shards.glob("*.mdb"):
            found |= _files(shard.read_bytes())
        return found

    def content(self, sha256: str, size: int) -> bytes:
        """Fetches a stored file as a client does."""
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
    """Formats a hash as Xet does: as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
