"""Tests which links a checkpoint may have: to its own files and to those of other checkpoints. It may have no pipes."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bpe import save_tokenizer
from support.hostile import far_link
from transformers import AutoConfig, AutoTokenizer

from qk_sniffer.backbone.loading import check_model
from qk_sniffer.config import ModelConfig
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.checkpoint_files import folder_digest
from qk_sniffer.hub.checkpoint_links import own_files, refuse_odd_files
from qk_sniffer.hub.lfs import refuse_pointer

COMMIT = "1" * 40
ODD_NAMES = ["tokenizer.model.", "TOKENIZER.JSON", "vocab_file", "a.log", "model.SAFETENSORS", ".hidden", "x.bin."]
TEMPLATE = "additional_chat_templates/a"
REFUSED = "which is neither in its folder nor a file of the same name in another checkpoint"


def write(path: Path, text: str = "[UNK]\nsecret") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def link(path: Path, to: Path | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "received" / "config.json", json.dumps({"model_type": "bert"})).parent


@pytest.mark.parametrize(
    "name",
    ["vocab.txt", "tokenizer.json", "chat_template.jinja", "spiece.model", "code.py", *ODD_NAMES, TEMPLATE],
)
def test_a_link_to_a_file_of_the_machine_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    link(folder / name, write(tmp_path / "home" / "id_rsa"))
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))


def test_no_part_of_a_checkpoint_is_read_through_such_a_link(tmp_path: Path, folder: Path) -> None:
    secret = write(tmp_path / "home" / "id_rsa")
    path = link(folder / "vocab.txt", secret)
    with pytest.raises(SourceError, match=REFUSED):
        load_tokenizer(ModelConfig(name=str(folder)))
    with pytest.raises(SourceError, match=REFUSED):
        check_model(ModelConfig(name=str(folder)))
    with pytest.raises(SourceError, match=REFUSED):
        check_model(ModelConfig(name=str(tmp_path / "home"), adapter=str(folder)))
    path.unlink()
    (folder / "config.json").unlink()
    link(folder / "config.json", secret)
    with pytest.raises(SourceError, match=REFUSED):
        check_model(ModelConfig(name=str(folder)))


def test_a_file_that_only_has_the_name_of_a_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    docker = write(tmp_path / ".docker" / "config.json", '{"auths": {}}')
    (folder / "config.json").unlink()
    link(folder / "config.json", docker)
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))
    (folder / "config.json").unlink()
    link(folder / "vocab.txt", write(docker.parent / "vocab.txt"))
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))


@pytest.mark.parametrize("name", ["model", "org/model"])
def test_a_file_with_the_name_of_a_repository_is_not_read(name: str, folder: Path, in_tmp: Path) -> None:
    """transformers reads it as config.json, as the file of weights, and as the vocabulary of a tokenizer."""
    path = in_tmp / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(folder / "config.json")
    config = ModelConfig(name=name)
    for load in (check_model, load_tokenizer):
        with pytest.raises(SourceError, match=f"{path} has the name of a repository of the Hub, and is no folder"):
            load(config, commit="a" * 40)


def test_a_link_through_another_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    base = write(tmp_path / "base" / "config.json", json.dumps({"model_type": "bert"})).parent
    link(base / "vocab.txt", write(tmp_path / "home" / "id_rsa"))
    link(folder / "vocab.txt", base / "vocab.txt")
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))
    (folder / "vocab.txt").unlink()
    link(folder / "vocab.txt", write(base / "notes.txt"))
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))


def test_templates_in_a_linked_folder_are_refused(tmp_path: Path, folder: Path) -> None:
    link(folder / "additional_chat_templates", write(tmp_path / "home" / "secret.jinja").parent)
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))


@pytest.mark.parametrize("name", ["chat_template.jinja", TEMPLATE])
def test_a_link_over_a_path_that_is_too_long_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    """`os.path.realpath` sees no link there, and transformers reads the file that it leads to."""
    far = far_link(folder, write(tmp_path / "home" / "id_rsa"))
    assert link(folder / name, folder / far).read_text().endswith("secret")
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))


def test_a_link_to_another_checkpoint_over_such_a_path_is_refused(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "home" / "vocab.txt")
    write(tmp_path / "home" / "config.json", json.dumps({"model_type": "bert"}))
    link(folder / TEMPLATE.partition("/")[0], folder / far_link(folder, tmp_path / "home"))
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files(str(folder))


@pytest.mark.parametrize("name", ["", TEMPLATE])
def test_a_folder_that_cannot_be_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its files can be opened by their names, links to elsewhere too."""
    closed = (folder / name).parent if name else folder
    closed.mkdir(exist_ok=True)
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(SourceError, match=f"{closed} cannot be listed: Permission denied"):
        refuse_odd_files(str(folder))


def test_a_loop_of_links_is_an_error(folder: Path) -> None:
    link(folder / "vocab.txt", folder.parent / "other" / "vocab.txt")
    write(folder.parent / "other" / "config.json", json.dumps({"model_type": "bert"}))
    link(folder.parent / "other" / "vocab.txt", folder / "vocab.txt")
    refuse_odd_files(str(folder))  # it cannot be opened
    with pytest.raises(SourceError):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_files_of_a_base_and_weights_may_be_links(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write(tmp_path / "base" / "tokenizer_config.json", json.dumps({"tokenizer_class": "BertTokenizer"})).parent
    write(base / "vocab.txt")
    link(folder / "own.json", "config.json")
    link(folder / "vocab.txt", "../base/vocab.txt")
    link(folder / "model.safetensors", write(tmp_path / "scratch" / "part-1"))
    link(folder / "checkpoint-500", tmp_path / "scratch")
    refuse_odd_files(str(folder))
    repository = tmp_path / "cache" / "models--org--name"
    write(repository / "blobs" / "1234")
    snapshot = link(repository / "snapshots" / COMMIT / "vocab.txt", "../../blobs/1234").parent
    link(snapshot / "config.json", write(repository / "blobs" / "5678", json.dumps({"model_type": "bert"})))
    refuse_odd_files(str(snapshot))
    (folder / "vocab.txt").unlink()
    link(folder / "vocab.txt", snapshot / "vocab.txt")
    refuse_odd_files(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refuse_odd_files("org/name", COMMIT)
    (repository / "blobs" / "1234").unlink()
    link(repository / "blobs" / "1234", tmp_path / "scratch" / "part-1")
    with pytest.raises(SourceError, match=REFUSED):
        refuse_odd_files("org/name", COMMIT)


@pytest.mark.parametrize("error", [None, ValueError("the secret")])
def test_a_link_among_the_blobs_of_the_cache_that_a_download_finds_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--org--name"
    link(repository / "blobs" / "etag", write(tmp_path / "home" / "file", "the secret"))
    with pytest.raises(SourceError, match=REFUSED), own_files("org/name", COMMIT):
        link(repository / "snapshots" / COMMIT / "chat_template.jinja", "../../blobs/etag")
        if error is not None:
            raise error


@pytest.mark.parametrize("load", ["model", "tokenizer"])
def test_a_file_that_becomes_a_link_while_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    folder, secret = save_tokenizer(tmp_path / "model"), write(tmp_path / "home" / "file", "the secret")
    write(folder / "config.json", json.dumps({"model_type": "llama"}))

    def planted(*_: Any, **__: Any) -> None:
        link(folder / "chat_template.jinja", secret)
        raise ValueError("the secret")

    monkeypatch.setattr(AutoConfig if load == "model" else AutoTokenizer, "from_pretrained", planted)
    with pytest.raises(SourceError, match=REFUSED) as error:
        (check_model if load == "model" else load_tokenizer)(ModelConfig(name=str(folder)))
    assert "the secret" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "x.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(folder: Path, name: str, impatient: None) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused = rf"/{name} is not a regular file, but a pipe"
    for load in (check_model, load_tokenizer):
        with pytest.raises(SourceError, match=refused):
            load(ModelConfig(name=str(folder)))
    folder_digest(folder)
    refuse_pointer(folder / name)


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.txt", "sub/../../secret.txt"])
def test_an_index_does_not_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    """The digest of a checkpoint is published: who knows its other files can guess a short one elsewhere."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("4711")
    (folder / "config.json").write_text("{}")
    (folder / "other.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError, match=r"other\.index\.json names the file .* which is not in the folder of the"):
        folder_digest(folder)
    (folder / "other.index.json").unlink()
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(SourceError, match=r"config\.json names the file"):
        folder_digest(folder)


@pytest.mark.parametrize("name", ["model-x.safetensors", "pytorch_model.bin", "x.gguf", "deeper/x.txt"])
def test_the_digest_has_no_link_out_of_the_folder_but_to_weights_that_are_loaded(name: str, tmp_path: Path) -> None:
    """As for an index: the digest would tell whether a guess of a short secret is right."""
    folder, secret = tmp_path / "model", tmp_path / "secret"
    (folder / "deeper").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    if name.startswith("deeper"):
        (folder / "other.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (folder / name).symlink_to(secret)
    digests = []
    for weights, content in (("1", "4711"), ("1", "4712"), ("2", "4712")):
        (tmp_path / "weights").write_text(weights)
        secret.write_text(content)
        digests.append(folder_digest(folder))
    assert digests[0] == digests[1] != digests[2], "the weights count, wherever they are"
    (folder / name).unlink()
    (folder / name).write_text("its own")
    assert folder_digest(folder) != digests[2]
    assert folder_digest(folder, ()) != folder_digest(folder), "a tokenizer has no weights elsewhere"


def test_the_digest_has_the_weights_elsewhere_that_an_index_or_the_settings_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("a.safetensors", "b.safetensors", "x.gguf", "other.gguf"):
        (tmp_path / name).write_text("1")
        (folder / name).symlink_to(tmp_path / name)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def changes(name: str, *weights: str) -> bool:
        before = folder_digest(folder, *([weights] if weights else []))
        (tmp_path / name).write_text((tmp_path / name).read_text() + "1")
        return folder_digest(folder, *([weights] if weights else [])) != before

    assert changes("a.safetensors") and changes("b.safetensors") and not changes("x.gguf")
    assert (
        changes("x.gguf", "x.gguf") and not changes("other.gguf", "x.gguf") and not changes("a.safetensors", "x.gguf")
    )


def test_the_digest_has_every_file_that_a_tokenizer_may_be_loaded_from(tmp_path: Path) -> None:
    folder = write(tmp_path / "model" / "config.json", "{}").parent
    for name in ("tokenizer.model.", "vocab_file", "TOKENIZER.JSON", TEMPLATE):
        before = folder_digest(folder, ())
        write(folder / name, "one")
        added = folder_digest(folder, ())
        write(folder / name, "another")
        assert len({before, added, folder_digest(folder, ())}) == 3, name
    whole = folder_digest(folder, ())
    for name in (
        "README.md",
        "train.log",
        ".gitattributes",
        "logo.png",
        "checkpoint-500/config.json",
        "generator_tokenizer/vocab",
    ):
        write(folder / name, "not loaded")
    assert folder_digest(folder, ()) == whole


def test_a_vocabulary_of_an_odd_name_counts(tmp_path: Path) -> None:
    """transformers looks for names that begin with `tokenizer.model` where a folder has no tokenizer.json."""
    folder, secret = tmp_path / "model", write(tmp_path / "home" / "id_rsa", "secret\n[UNK]")
    special = {f"{name}_token": "[UNK]" for name in ("unk", "cls", "pad", "mask", "eos")}
    write(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "EsmTokenizer", **special}))
    write(folder / "config.json", json.dumps({"model_type": "llama"}))
    found = []
    for words in ("one\ntwo\n[UNK]", "two\none\n[UNK]"):
        write(folder / "tokenizer.model.", words)
        tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
        found.append((tokenizer.token_strings([0])[0], folder_digest(folder, ())))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    (folder / "tokenizer.model.").unlink()
    link(folder / "tokenizer.model.", secret)
    with pytest.raises(SourceError, match=REFUSED):
        load_tokenizer(ModelConfig(name=str(folder)))
