"""Tests that no file of a tokenizer makes transformers open a file elsewhere on this machine."""

import copy
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from support.bpe import save_tokenizer
from support.tokenizers_of_kinds import tokenizer_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from qk_sniffer.config import ModelConfig
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer
from qk_sniffer.corpus.tokenizer_files import difference_from_file, randomness_of
from qk_sniffer.errors import SourceError

if TYPE_CHECKING:
    from support.fake_hub import FakeHub

pytestmark = pytest.mark.floor

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]

Save = Callable[..., Path]
"""Saves a tokenizer of JSON files by their names, and a vocabulary."""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A text file of the user that happens to work as a vocabulary."""
    return write(tmp_path / "private" / "notes.txt", "\n".join([*WORDS, "password"]))


@pytest.fixture(params=["folder", "hub"])
def save(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Saves a tokenizer of BERT as a local folder, or as a repository in the Hub's cache."""
    commit = "1" * 40
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def saved(files: dict[str, Any], vocabulary: list[str] | None = None) -> Path:
        hub = request.param == "hub"
        folder = cache / "models--org--name" / "snapshots" / commit if hub else tmp_path / "folder"
        files = {"config.json": {"model_type": "bert"}} | files
        for name, content in files.items():
            write(folder / name, json.dumps(content))
        if vocabulary:
            write(folder / "vocab.txt", "\n".join(vocabulary))
        return Path("org/name") if hub else folder

    return saved


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(name: Path) -> TextTokenizer:
    return load_tokenizer(ModelConfig(name=str(name)))


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    [tokens] = tokenizer([Example(0, 0, "0", text)])
    return tokens.ids.tolist()


SETTINGS = {"tokenizer_class": "BertTokenizer"}

TIKTOKEN = "TIKTOKEN_CACHE_DIR"
"""The variable that names the folder of the copies that the package tiktoken makes of vocabularies."""


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("tokenizer_config.json", "vocab"),
        ("tokenizer_config.json", "merges"),
        ("tokenizer_config.json", "init_inputs"),
        ("tokenizer_config.json", "merges_file"),
        ("special_tokens_map.json", "vocab"),
        ("special_tokens_map.json", "vocab_file"),
        ("tokenizer.json", "model.vocab"),
        ("tokenizer.4.0.0.json", "model.vocab"),
    ],
)
def test_a_file_that_names_a_file_elsewhere_is_refused(file: str, key: str, save: Save, secret: Path) -> None:
    named: Any = [str(secret)] if key == "init_inputs" else str(secret)
    files: dict[str, Any] = {"tokenizer_config.json": dict(SETTINGS)}
    if key == "model.vocab":
        described = {"version": "1.0", "added_tokens": [], "model": {"type": "WordPiece", "vocab": named}}
        files[file] = described
        files["tokenizer_config.json"]["fast_tokenizer_files"] = [file]
    else:
        files.setdefault(file, {})[key] = named
    name = save(files, WORDS)
    with pytest.raises(SourceError) as caught:
        load(name)
    assert f"the tokenizer of {name} is refused: {key} of its {file} is {named!r}" in str(caught.value)


def test_a_list_of_files_that_leaves_the_repository_is_refused(save: Save) -> None:
    name = save({"tokenizer_config.json": SETTINGS | {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}}, WORDS)
    with pytest.raises(SourceError, match=r"names \.\./tokenizer\.4\.0\.0\.json in fast_tokenizer_files"):
        load(name)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gguf_file", "deeper/v.gguf"),
        ("subfolder", "/home/user"),
        ("cache_dir", "/home/user/.config/autostart"),
        ("revision", "main"),
        ("token", "hf_other"),
        ("proxies", {"https": "http://localhost:1"}),
        ("repo_type", "dataset"),
    ],
)
def test_a_file_that_says_from_where_to_load_is_refused(file: str, key: str, value: Any, save: Save) -> None:
    settings = {"tokenizer_config.json": dict(SETTINGS)}
    settings.setdefault(file, {})[key] = value
    name = save(settings, WORDS)
    with pytest.raises(SourceError) as caught:
        load(name)
    assert f"the tokenizer of {name} is refused: {key} of its {file} is {value!r}, which would decide" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("key", "value"), [("name_or_path", "org/other"), ("is_local", False), ("local_files_only", 0)]
)
def test_special_tokens_that_say_what_the_loader_says_are_refused(key: str, value: Any, save: Save) -> None:
    """transformers reads them last, so that they would replace its own values."""
    name = save({"tokenizer_config.json": SETTINGS, "special_tokens_map.json": {key: value}}, WORDS)
    with pytest.raises(SourceError, match=rf"{key} of its special_tokens_map\.json is {value!r}, which would decide"):
        load(name)


MYT5 = {"tokenizer_class": "MyT5Tokenizer"}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("added_tokens_decoder", {"1_000_000_000 ": {"content": "<x>"}}, "has the id 1,000,000,000"),
        ("vocab", {"a" * 10_001: 0}, "has a token of 10,001 characters"),
    ],
)
def test_tokens_that_fill_the_memory_or_take_hours_are_refused(
    file: str, key: str, value: Any, problem: str, save: Save
) -> None:
    with pytest.raises(SourceError, match=f"{key} of its {file} {problem}"):
        load(save({file: {key: value}}, WORDS))


@pytest.mark.parametrize("key", ["decompose_map", "merge_map"])
def test_byte_maps_that_name_a_file_are_refused(key: str, save: Save, tmp_path: Path) -> None:
    private = write(tmp_path / "private" / "map.json", json.dumps({"61": "62"}))
    maps: dict[str, Any] = {"decompose_map": {"61": "63"}, "merge_map": {"64 65": "66"}}
    name = save({"tokenizer_config.json": MYT5, "byte_maps.json": maps})
    assert ids(load(name), "abde") == [3 + 0x63, 3 + 0x62, 3 + 0x66, 1]
    save({"tokenizer_config.json": MYT5, "byte_maps.json": maps | {key: str(private)}})
    with pytest.raises(SourceError, match=rf"{key} of its byte_maps\.json is '{re.escape(str(private))}'"):
        load(name)


def test_a_token_without_an_id_is_named(save: Save) -> None:
    maps = {"decompose_map": {"7a": "abc"}, "merge_map": {"abc": "abc"}}
    tokenizer = load(save({"tokenizer_config.json": MYT5, "byte_maps.json": maps}))
    for num_embeddings in (None, 1000):
        tokenizer.check_fits(num_embeddings, "the model")
        with pytest.raises(SourceError, match=r"has no id for a token of example 0 of the dataset \(id 0\)"):
            ids(tokenizer, "oz")


def test_the_libraries_that_a_tokenizer_uses(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = load(save_tokenizer(tmp_path / "source")).libraries
    name = save({"tokenizer_config.json": MYT5, "byte_maps.json": {"decompose_map": {}, "merge_map": {}}})
    before = load(name).libraries
    for module in ("tiktoken", "sentencepiece"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert {*load(name).libraries} == {*before, "tiktoken", "sentencepiece"}
    assert load(tmp_path / "source").libraries == described == []


def test_a_device_is_not_opened(save: Save) -> None:
    name = save({"tokenizer_config.json": SETTINGS | {"merges_file": os.devnull}}, WORDS)
    with pytest.raises(SourceError, match=rf"merges_file of its tokenizer_config\.json is '{os.devnull}'"):
        load(name)


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("mecab_kwargs", "mecab_option"),
        ("sudachi_kwargs", "sudachi_config_path"),
        ("sudachi_kwargs", "sudachi_resource_dir"),
        ("sudachi_kwargs", "sudachi_dict_type"),
        ("sp_model_kwargs", "model_file"),
    ],
)
def test_an_option_of_a_library_that_names_a_file_is_refused(key: str, option: str, save: Save, secret: Path) -> None:
    name = save({"tokenizer_config.json": SETTINGS | {key: {option: str(secret)}}}, WORDS)
    with pytest.raises(SourceError) as caught:
        load(name)
    assert f"{key}.{option} of its tokenizer_config.json is {str(secret)!r}" in str(caught.value)


@pytest.mark.parametrize(
    "file", [".tokenizer.4.0.0.json", "tokenizer.4.0.0.json.md", "deeper/tokenizer.4.0.0.json", "tokenizer.json\n", 4]
)
def test_a_list_of_files_with_names_that_no_digest_has_is_refused(file: Any, save: Save) -> None:
    name = save({"tokenizer_config.json": SETTINGS | {"fast_tokenizer_files": [file]}}, WORDS)
    with pytest.raises(SourceError, match=r"in fast_tokenizer_files of tokenizer_config\.json, which is not the name"):
        load(name)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_config_that_stands_for_another_one_is_refused(trusted: bool, save: Save) -> None:
    config = {"model_type": "bert", "configuration_files": ["config.4.0.0.json"]}
    name = save({"config.json": config, "tokenizer_config.json": SETTINGS}, WORDS)
    with pytest.raises(SourceError, match=r"config\.json is refused: its configuration_files names configs"):
        load_tokenizer(ModelConfig(name=str(name), trust_remote_code=trusted))


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        ({"model_type": "bert"}, {"tokenizer_class": "RagTokenizer"}, "RagTokenizer"),
        ({"model_type": "bert"}, {"tokenizer_class": "RagTokenizerFast"}, "RagTokenizerFast"),
        ({"model_type": "bert"}, {"tokenizer_class": "AutoProcessor"}, "AutoProcessor"),
        ({"model_type": "bert"}, {"tokenizer_class": "pipeline"}, "pipeline"),
        ({"model_type": "timesformer", "tokenizer_class": "RagTokenizer"}, {}, "RagTokenizer"),
        ({"model_type": "rag"}, {}, "RagTokenizer"),
        ({"model_type": "encoder-decoder", "encoder": {"model_type": "rag"}}, {}, "RagTokenizer"),
    ],
)
def test_a_class_that_is_no_tokenizer_is_refused(
    config: dict[str, Any], settings: dict[str, Any], named: str, save: Save
) -> None:
    inner = {"auto_map": {"AutoTokenizer": [None, "tok.Planted"]}}
    files = {"config.json": config, "tokenizer_config.json": settings}
    name = save(files | {"question_encoder_tokenizer/tokenizer_config.json": inner}, WORDS)
    with pytest.raises(SourceError, match=rf"files name the class {named}, which is not a single tokenizer\. Set"):
        load(name)


@pytest.mark.parametrize("before", [None, "/home/user/cache"])
def test_tiktoken_has_no_cache_while_a_tokenizer_loads(
    before: str | None, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv(TIKTOKEN, raising=False)
    else:
        monkeypatch.setenv(TIKTOKEN, before)
    seen: list[str | None] = []

    original = BertTokenizer.__init__

    def watched(self: BertTokenizer, *args: Any, **options: Any) -> None:
        seen.append(os.environ.get(TIKTOKEN))
        original(self, *args, **options)

    monkeypatch.setattr(BertTokenizer, "__init__", watched)
    load(save({"tokenizer_config.json": SETTINGS}, WORDS))
    assert seen == [""] and os.environ.get(TIKTOKEN) == before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "expected"), [("mistral", ["1", "2"]), ("llama", ["12"])])
def test_the_fix_of_mistral_depends_on_the_commit_alone(
    kind: str, expected: list[str], hub: "FakeHub", endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks the Hub for today's tags; with a folder, and offline, it reads the model_type instead."""
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # has the address of an earlier Hub
    vocabulary = {
        word: number for number, word in enumerate(["[UNK]", "12", "1", "2", *map("#{}".format, range(100_000))])
    }
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    folder = tmp_path / "folder"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(folder / "tokenizer_config.json", json.dumps(settings | {"fix_mistral_regex": True}))
    write(folder / "config.json", json.dumps({"model_type": kind, "transformers_version": "4.50.0"}))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = hub.commit("org/name", files)
    found = [load(folder)]
    for tags in ([], ["base_model:mistralai/Mistral-Nemo-Base-2407"]):
        hub.repositories["org/name"].tags = tags
        found.append(load_tokenizer(ModelConfig(name="org/name")))
    hub.commit("org/name", files | {"config.json": json.dumps({"model_type": "gpt2"}).encode()})
    found.append(load_tokenizer(ModelConfig(name="org/name"), commit))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found.append(load_tokenizer(ModelConfig(name="org/name"), commit))
    assert [each.token_strings(ids(each, "12")) for each in found] == [expected] * 5


def test_what_published_tokenizers_have_stays_allowed(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "work" / "tokenizer.json", "{}").parent)
    name = save(
        {
            "tokenizer_config.json": SETTINGS
            | {
                "init_inputs": [],
                "tokenizer_file": "tokenizer.json",
                "special_tokens_map_file": "/root/.cache/torch/special_tokens_map.json",
                "vocab_file": "/content/model/vocab.txt",
                "merges_file": "merges.txt",
                "name_or_path": "bert-base-uncased",
                "is_local": True,
                "cache_dir": None,
                "revision": None,
                "token": False,
                "local_files_only": False,
                "sp_model_kwargs": {},
                "mecab_kwargs": None,
                "sudachi_kwargs": {"sudachi_dict_type": "core", "sudachi_config_path": None},
                "fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.99.json"],
            },
            "special_tokens_map.json": {"unk_token": "[UNK]", "pad_token": {"content": "[PAD]", "lstrip": False}},
            "added_tokens.json": {"vocab": 7},
        },
        WORDS,
    )
    assert ids(load(name), "hello world") == [2, 5, 6, 3]


def test_a_tokenizer_with_its_own_vocabulary_in_json_loads(save: Save, tmp_path: Path) -> None:
    source = save_tokenizer(tmp_path / "source")
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in source.glob("*.json")}
    assert ids(load(save(files)), "hello world") == ids(load(source), "hello world")


def test_code_that_the_user_trusts_may_define_keys(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "source")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(folder / "merges.own", "a b")
    write(folder / "tokenizer_config.json", json.dumps(settings | {"vocab": str(folder / "merges.own")}))
    with pytest.raises(SourceError, match=r"vocab of its tokenizer_config\.json"):
        load(folder)
    load_tokenizer(ModelConfig(name=str(folder), trust_remote_code=True))


def test_a_tokenizer_of_a_single_file(tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save_tokenizer(tmp_path / "source").parent)
    file = Path("source/tokenizer.json")  # transformers takes no absolute path of a file
    assert ids(load(file), "hello world") == ids(load(file.parent), "hello world")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["vocab"] = str(secret)
    write(file, json.dumps(content))
    with pytest.raises(SourceError, match=r"model\.vocab of its tokenizer\.json"):
        load(file)


def edited(folder: Path, **model: Any) -> Path:
    """Changes entries of `model` in the tokenizer.json of a folder."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    described["model"] |= model
    file.write_text(json.dumps(described), encoding="utf-8")
    return folder


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "bpe")
    expected = ids(load(folder), "hello world")
    for dropout in (0.1, 1e-6):
        with pytest.raises(
            SourceError,
            match=rf"bpe splits a text differently each time: model\.dropout of its tokenizer\.json is {dropout:g}\. "
            r"Set model\.tokenizer\.name to a copy",
        ):
            load(edited(folder, dropout=dropout))
    for none in (0.0, None):
        assert ids(load(edited(folder, dropout=none)), "hello world") == expected


def test_a_class_that_ignores_the_dropout_of_its_file_is_read(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(folder / "tokenizer_config.json", json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    before = [difference_from_file(AutoTokenizer.from_pretrained(folder), str(folder), None)]
    tokenizer = AutoTokenizer.from_pretrained(edited(folder, dropout=0.5))
    assert randomness_of(tokenizer) is None
    assert [difference_from_file(tokenizer, str(folder), None) for _ in range(5)] == before * 5


def test_a_tokenizer_that_draws_among_the_best_splits_is_refused() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("unigram"))
    assert randomness_of(tokenizer) is None
    model = tokenizer.backend_tokenizer.model
    for alpha, nbest_size, is_random in ((0.1, None, True), (0.1, 0, True), (0.1, 8, True), (0.1, 1, False)):
        model.alpha, model.nbest_size = alpha, nbest_size
        reason = f"alpha and nbest_size of its Unigram model are 0.1 and {nbest_size}"
        assert randomness_of(tokenizer) == (reason if is_random else None)


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}, [1, 1, 1, 1], "sp_model_kwargs.enable_sampling"),
        ({"enable_sampling": False}, [1, 1, 1, 1], None),
        ({}, [1, 1, 2, 1], "gives other tokens the second time"),
        ({}, [1, 1, 1, 1], None),
    ],
)
def test_the_tokens_of_code_of_a_checkpoint_are_compared(
    options: dict[str, Any], tokens: list[int], reason: str | None
) -> None:
    class Slow:
        sp_model_kwargs = options

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return {"input_ids": [tokens.pop()]}

    found = randomness_of(Slow())
    assert found is None if reason is None else reason in str(found)
