"""A damaged file of a checkpoint is named before anything is loaded, with what is wrong and the way out."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.gguf_files import write_gguf
from support.tiny import CUT
from support.zoo import CASES

from qk_sniffer.backbone.damaged_files import damage
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

LLAMA = replace(CASES[0], options=CUT)
INDEX = "model.safetensors.index.json"


def refused(folder: Path, file: str, how: str, **settings: object) -> None:
    """Checks that both readers of a checkpoint refuse `file` for the reason `how`."""
    for read in (check_model, load_backbone):
        with pytest.raises(SourceError) as caught:
            read(ModelConfig(name=str(folder), dtype="float32", **settings))  # type: ignore[arg-type]
        message = str(caught.value)
        assert f"model {folder} has a damaged file, {file}: {how}" in message
        assert message.endswith("Restore it, or download the model again (hf download)")


@pytest.mark.parametrize("kept", [0, 7, 100, 1_000, -1])
def test_a_file_of_weights_that_is_too_short(kept: int, tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    size = file.stat().st_size
    how = f"it has {size:,} bytes, and its header says {len(whole):,}" if kept < 0 else f"after {size:,} bytes"
    refused(tmp_path, file.name, how if kept < 0 else f"it ends in its header, {how}")


def of_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not found</html>" * 9,
        of_header(b"[]"),
        of_header(b'{"a": 1}'),
        of_header(b'{"a": {"dtype": "F32"}}'),
        of_header(b'{"a": {"data_offsets": [0]}}'),
        of_header(b"\xff\xff"),
        bytes(8),
    ],
)
def test_a_file_that_is_not_of_its_format(content: bytes, tmp_path: Path) -> None:
    LLAMA.config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, "model.safetensors", "it is not a safetensors file")


def test_the_damaged_one_of_several_files_is_named(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("model-*"))[2]
    shard.write_bytes(shard.read_bytes()[:-9])
    refused(tmp_path, shard.name, f"it has {shard.stat().st_size:,} bytes, and its header says")


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (b'{"weight_map": ', "it is not JSON (Expecting value in line 1)"),
        (b"", "it is not JSON (Expecting value in line 1)"),
        ('{"weight_map": {}}'.encode("utf-16"), "it is not UTF-8"),
        (b"[]", "it holds list, not an object"),
        (b"{}", "it has no weight_map, which names the file of each weight"),
        (b'{"weight_map": ["a"]}', "it has no weight_map, which names the file of each weight"),
        (b'{"weight_map": null}', "it has no weight_map, which names the file of each weight"),
        (b'{"weight_map": {}}', "its weight_map does not name the file of each weight"),
        (b'{"weight_map": {"a": 1}}', "its weight_map does not name the file of each weight"),
        (b'{"weight_map": {"a": "a", "b": []}}', "its weight_map does not name the file of each weight"),
    ],
)
def test_an_index_that_names_no_files(content: bytes, how: str, tmp_path: Path) -> None:
    LLAMA.config().save_pretrained(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path, INDEX, how)


def test_an_index_names_only_files_of_its_folder(tmp_path: Path) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    LLAMA.model().save_pretrained(folder, max_shard_size="4KB")
    index = json.loads((folder / INDEX).read_bytes())
    shard = sorted(folder.glob("model-*"))[1]
    for place in (other, folder / "deeper"):
        place.mkdir()
        (place / shard.name).write_bytes(shard.read_bytes())
    shard.unlink()

    def moved(to: str) -> None:
        shards = {key: to if file == shard.name else file for key, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": shards}))

    for outside in (f"{other}/{shard.name}", f"../other/{shard.name}", f"deeper/../../other/{shard.name}"):
        moved(outside)
        refused(folder, INDEX, f"it names 1 files outside of its folder, which are not read: {outside}.")
    moved(f"deeper/{shard.name}")
    load_backbone(ModelConfig(name=str(folder), dtype="float32"))


@pytest.mark.parametrize("change", [lambda whole: b"", lambda whole: whole[:-500]], ids=["empty", "cut"])
def test_a_pickle_that_is_too_short(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    file = tmp_path / "pytorch_model.bin"
    torch.save(load_file(weights), file)
    weights.unlink()
    load_backbone(ModelConfig(name=str(tmp_path), dtype="float32", allow_pickle=True))
    file.write_bytes(change(file.read_bytes()))
    refused(tmp_path, file.name, "it is empty" if not file.stat().st_size else "its end is missing", allow_pickle=True)


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path)
    for content, how in (('{"model_type": "lla', "it is not JSON ("), ("[]", "it holds list, not an object")):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, "config.json", how)


def test_a_gguf_file_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    whole = write_gguf(LLAMA.model(), path).read_bytes()
    assert damage(path) is None
    for kept, how in (
        (0, "it is not a GGUF file"),
        (4, "it ends in its header, after 4 bytes"),
        (100, "it ends in its header, after 100 bytes"),
        (len(whole) // 2, f"it has {len(whole) // 2:,} bytes, and its header says {len(whole):,}"),
        (len(whole) - 1, f"it has {len(whole) - 1:,} bytes, and its header says {len(whole):,}"),
    ):
        path.write_bytes(whole[:kept])
        with pytest.raises(SourceError) as caught:
            check_model(ModelConfig(name=str(tmp_path), gguf_file=path.name))
        assert f"model.gguf_file=tiny.gguf of {tmp_path} is damaged: {how}. Restore it" in str(caught.value)
