"""Tests that a compressed file of someone else does not fill the memory."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
from support.data_files import opened

from qk_sniffer.errors import SourceError

LONG = b"a" * 8_000_000
CONTENT = {"a.txt": LONG, "a.jsonl": b'{"text": "' + LONG + b'"}\n', "a.csv": b'text\n"' + LONG + b'"\n'}
COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", CONTENT)
def test_a_file_does_not_expand_out_of_proportion(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{name}.{suffix}"
    file.write_bytes(COMPRESSED[suffix](CONTENT[name]))
    (example,) = opened(file).examples()
    assert len(example.text) == len(LONG)
    monkeypatch.setattr("qk_sniffer.corpus.data_files.MOST_UNCHECKED_BYTES", 1 << 20)
    with pytest.raises(SourceError, match=r"expand to more than .* MB, which no texts do.* decompress it first"):
        list(opened(file).examples())
