"""Publishing to a Hub on loopback through the real client, and reading back through `load_dataset`."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub
from huggingface_hub import HfApi

from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.hub import Published, publish, require_login
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout, examples_schema, schema
from qk_sniffer.store.manifest import FileEntry, Written

REPO = "alice/vectors"
BRANCH = "some-model-some-texts"
HEADS = {"l00h00q": 1, "l00h03q": 2, "l00h00k": 3}
"""Heads of a dataset, and a seed for each."""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def api(hub: FakeHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_alice")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The network is there, Xet and a login are not, and nobody waits: the seconds are kept instead."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def dataset(root: Path, heads: dict[str, int] = HEADS, model: str = "some-model", timing: float = 1.0) -> Path:
    """A finished dataset of five rows a head, as the store leaves it."""
    shutil.rmtree(root, ignore_errors=True)
    names = [f"{head}/data.parquet" for head in heads]
    for name, seed in zip(names, heads.values(), strict=True):
        write(root / name, rows(seed))
    write(root / "examples/data.parquet", pa.Table.from_pylist([EXAMPLE], examples_schema()))
    configs = "".join(f"- config_name: {head}\n  data_files: {head}/data.parquet\n" for head in heads)
    card = f"---\nconfigs:\n{configs}---\n# Vectors of {model}\n".encode()
    (root / "README.md").write_bytes(card)
    files = {name: FileEntry.of((root / name).read_bytes()) for name in [*names, "examples/data.parquet"]}
    written = Written(
        files, {"q": {0: 5 * len(heads)}}, num_examples=1, num_tokens=5, num_truncated=0, nonfinite_rows={}
    )
    job = {"config": {"model": {"slug": model}, "dataset": {"slug": "some-texts"}}}
    manifests.write(Layout(root), manifests.build(job, written, card=card, timings={"compact": timing}))
    return root


EXAMPLE = {"example_id": 0, "source_id": "0", "num_tokens": 5, "text_hash": "00", "index": 0, "truncated": False}


def rows(seed: int) -> pa.Table:
    vectors = np.random.default_rng(seed).random((5, 4), np.float32)
    rows = [
        {"bucket": 0, "example_id": 0, "position": position, "vector": vector.tolist(), "sliding_window": None}
        for position, vector in enumerate(vectors)
    ]
    return pa.Table.from_pylist(rows, schema(4))


def write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def held(hub: FakeHub, branch: str = BRANCH) -> dict[str, bytes]:
    """What the branch holds, but for what every repository does."""
    files = dict(hub.repositories[REPO].files(branch))
    assert files.pop(".gitattributes")
    return files


def published(hub: FakeHub, branch: str = BRANCH) -> int:
    """The commits that were made to the branch, after the repository's first."""
    return len(hub.repositories[REPO].history(branch)) - 1


def test_two_branches_are_read_back_by_revision(hub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    roots = {"one-texts": dataset(tmp_path / "1", model="one"), "two": dataset(tmp_path / "2", {"l07h01k": 9}, "two")}
    for branch, root in roots.items():
        done = publish(root, REPO, branch, api=api)
        head = hub.repositories[REPO].history(branch)[0]
        assert done == Published(f"{hub.url}/datasets/{REPO}/tree/{branch}", head.id, True)
        assert held(hub, branch) == contents(root) and published(hub, branch) == 1
        assert ": 15 rows [" in head.title or head.title.startswith("two on some-texts: 5 rows [")
    assert published(hub, "main") == 0
    assert not hub.repositories[REPO].private

    code = f"""
import json
from datasets import get_dataset_config_names, load_dataset
found = {{}}
for branch, head in (("one-texts", "l00h03q"), ("two", "l07h01k")):
    rows = load_dataset({REPO!r}, head, revision=branch, split="train").to_list()
    found[branch] = [get_dataset_config_names({REPO!r}, revision=branch), rows]
streamed = load_dataset({REPO!r}, "l00h00k", revision="one-texts", split="train", streaming=True)
print(json.dumps([found, list(streamed)]))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, streamed = json.loads(done.stdout)
    assert found == {"one-texts": [list(HEADS), rows(2).to_pylist()], "two": [["l07h01k"], rows(9).to_pylist()]}
    assert streamed == rows(3).to_pylist()


def test_unchanged_content_makes_no_commit(hub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    first = publish(dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    uploads = hub.count("POST", "/preupload/")
    again = publish(dataset(tmp_path / "b", timing=2.0), REPO, BRANCH, api=api)
    assert again == Published(first.url, first.commit, False)
    assert (hub.count("POST", "/commit/"), hub.count("POST", "/preupload/")) == (1, uploads)


def test_another_version_replaces_and_deletes(api: HfApi, hub: FakeHub, tmp_path: Path) -> None:
    hub.page_size = 2
    publish(dataset(tmp_path / "a", {f"l{layer:02d}h00q": layer for layer in range(8)}), REPO, BRANCH, api=api)
    repository = hub.repositories[REPO]
    repository.add(BRANCH, "by hand", repository.files(BRANCH) | {"notes.txt": b"mine", "l00h00q/notes": b"mine"})
    root = dataset(tmp_path / "b", {"l02h00q": 2, "l03h00q": 33, "l09h00k": 9})
    done = publish(root, REPO, BRANCH, api=api)
    assert done.changed and published(hub) == 3
    assert held(hub) == contents(root) | {"notes.txt": b"mine", "l00h00q/notes": b"mine"}


def test_only_what_the_manifest_names_is_published(hub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    root = dataset(tmp_path / "a")
    expected = contents(root)
    for stranger in (".qk_sniffer/job.json", "notes.txt", "l09h09q/data.parquet", ".env", "examples/more.parquet"):
        (root / stranger).parent.mkdir(exist_ok=True)
        (root / stranger).write_text("mine")
    publish(root, REPO, BRANCH, api=api)
    assert held(hub) == expected


FAULTS: dict[str, dict[str, Any]] = {
    "two server errors": {"status": 503, "times": 2},
    "a time-out": {"status": 408},
    "a conflict": {"status": 409},
    "another parent": {"status": 412},
    "a rate limit": {"status": 429, "Retry_After": "700"},
    "a rate limit in the newer header": {"status": 429, "RateLimit": '"api";r=0;t=700'},
    "a lost connection": {"how": "drop"},
    "a lost answer": {"how": "lose"},
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_at_the_commit_is_tried_again(
    name: str, hub: FakeHub, api: HfApi, tmp_path: Path, waits: list[float]
) -> None:
    root, fault = dataset(tmp_path / "a"), FAULTS[name]
    hub.fault("POST", "/commit/", **fault)
    done = publish(root, REPO, BRANCH, api=api)
    assert done.changed and done.commit == hub.repositories[REPO].branches[BRANCH]
    assert published(hub) == 1 and held(hub) == contents(root)
    assert hub.count("PUT", "/lfs/") == 4, "files that are there are not sent again"
    asked = 700 if fault.get("status") == 429 else 0
    assert len(waits) == fault.get("times", 1) and all(asked + 1 <= wait < asked + 10 for wait in waits)


@pytest.mark.parametrize("how", ["reply", "drop", "lose"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/commits/{BRANCH}"),
        ("GET", "/commits/main"),
        ("POST", "/api/repos/create"),
        ("POST", "/branch/"),
        ("GET", "/tree/"),
        ("POST", "/api/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/info/lfs/objects/batch"),
        ("PUT", "/lfs/"),
    ],
)
def test_what_passes_elsewhere_is_tried_again(
    method: str, path: str, how: str, hub: FakeHub, api: HfApi, tmp_path: Path
) -> None:
    root = dataset(tmp_path / "a")
    hub.fault(method, path, how, times=2)
    assert publish(root, REPO, BRANCH, api=api).changed
    assert hub.count(method, path) > 2 or how == "lose", "the fault was met"
    assert published(hub) == 1 and held(hub) == contents(root)


def test_an_outage_ends_after_a_few_tries(hub: FakeHub, api: HfApi, tmp_path: Path, waits: list[float]) -> None:
    hub.fault("POST", "/commit/", times=100)
    with pytest.raises(HubError, match=r"the Hub answers 503.*stays whole in .*/a; the same command publishes it"):
        publish(dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    assert hub.count("POST", "/commit/") == 5
    assert len(waits) == 4 and all(2.0**n <= wait <= 3 * 2.0**n for n, wait in enumerate(waits))


def test_a_wait_of_hours_is_not_waited_for(hub: FakeHub, api: HfApi, tmp_path: Path, waits: list[float]) -> None:
    hub.fault("POST", "/commit/", status=429, Retry_After="86400")
    with pytest.raises(HubError, match="answers 429"):
        publish(dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    assert waits == []


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, None, r"refuses the token .*HF_TOKEN.*hf auth login"),
        (403, None, r"no right to write there .*output\.hf_repo_id"),
        (403, "GatedRepo", r"gated .*ask for access"),
        (404, None, "knows no such place"),
        (400, None, r"answers 400, .*as the test asks"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/commit/"), ("POST", "/preupload/"), ("GET", "/commits/")])
def test_what_does_not_pass_ends_at_once(
    method: str, path: str, status: int, code: str, message: str, hub: FakeHub, api: HfApi, tmp_path: Path
) -> None:
    root = dataset(tmp_path / "a")
    before = contents(root)
    headers = {"X_Error_Code": code} if code else {}
    hub.fault(method, path, status=status, times=100, **headers)
    with pytest.raises(HubError, match=message) as caught:
        publish(root, REPO, BRANCH, api=api)
    text = str(caught.value)
    assert f"published to {REPO}, branch {BRANCH}" in text and f"whole in {root}; the same command" in text
    assert "hf_alice" not in text
    assert hub.count(method, path) == 1
    assert contents(root) == before


def test_faults_of_a_single_upload(hub: FakeHub, api: HfApi, tmp_path: Path, waits: list[float]) -> None:
    """huggingface_hub wraps what its upload threads raise; these two it does not try again by itself."""
    root = dataset(tmp_path / "a")
    hub.fault("PUT", "/lfs/", status=403)
    with pytest.raises(HubError, match="no right to write"):
        publish(root, REPO, BRANCH, api=api)
    assert waits == [] and published(hub) == 0
    hub.fault("PUT", "/lfs/", status=409)
    assert publish(root, REPO, BRANCH, api=api).changed
    assert len(waits) == 1 and held(hub) == contents(root)


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (True, REPO, r"there is no token: set HF_TOKEN, or .*hf auth login"),
        ("hf_mallory", REPO, "refuses the token"),
        ("hf_bob", REPO, "no right to write there"),
        ("hf_alice", "alice/two--dashes", "Cannot have --"),
        ("hf_secret\ntoken", REPO, r"Illegal header value .*\*\*\*"),
    ],
)
def test_a_wrong_login_or_name_ends_at_once(
    token: str | bool, repo_id: str, message: str, hub: FakeHub, tmp_path: Path, waits: list[float]
) -> None:
    with pytest.raises(HubError, match=message) as caught:
        publish(dataset(tmp_path / "a"), repo_id, BRANCH, api=HfApi(endpoint=hub.url, token=token))
    assert not isinstance(token, str) or (token not in str(caught.value) and "secret" not in str(caught.value))
    assert hub.repositories == {} and waits == []


def test_another_writer_in_between(hub: FakeHub, tmp_path: Path) -> None:
    """What was known of the branch before is not relied upon: a file that was unchanged then is not now."""

    class Raced(HfApi):
        def preupload_lfs_files(self, *args: Any, **kwargs: Any) -> None:
            super().preupload_lfs_files(*args, **kwargs)
            if published(hub) == 1:
                repository = hub.repositories[REPO]
                theirs = {"l00h00k/data.parquet": b"theirs", "l05h00q/data.parquet": b"theirs", "notes.txt": b"theirs"}
                repository.add(BRANCH, "theirs", repository.files(BRANCH) | theirs)

    publish(dataset(tmp_path / "a"), REPO, BRANCH, api=HfApi(endpoint=hub.url, token="hf_alice"))
    root = dataset(tmp_path / "b", HEADS | {"l00h00q": 11})
    publish(root, REPO, BRANCH, api=Raced(endpoint=hub.url, token="hf_alice"))
    assert held(hub) == contents(root) | {"notes.txt": b"theirs"} and published(hub) == 3
    assert [status for _, path, status in hub.log if "/commit/" in path] == [200, 412, 200]


def test_another_writer_after_a_lost_answer(hub: FakeHub, tmp_path: Path) -> None:
    """Who comes later wins: what landed is not put on top again."""

    class Raced(HfApi):
        def create_commit(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().create_commit(*args, **kwargs)
            finally:
                hub.repositories[REPO].add(BRANCH, "theirs", {"README.md": b"theirs"})

    hub.fault("POST", "/commit/", "lose")
    done = publish(dataset(tmp_path / "a"), REPO, BRANCH, api=Raced(endpoint=hub.url, token="hf_alice"))
    theirs, ours, _ = hub.repositories[REPO].history(BRANCH)
    assert (theirs.title, done.commit, done.changed) == ("theirs", ours.id, True)


def test_private(hub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    root = dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, private=True, api=api)
    assert hub.repositories[REPO].private
    hub.create("alice/public")
    with pytest.raises(HubError, match=r"exists and is public.*settings.*stays whole"):
        publish(root, "alice/public", BRANCH, private=True, api=api)
    assert hub.count("POST", "/commit/") == 1


def test_a_dataset_that_is_not_whole_is_not_published(hub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    with (dataset(tmp_path / "a") / "l00h03q" / "data.parquet").open("ab") as file:
        file.write(b"more")
    with pytest.raises(StoreError, match=r"l00h03q/data\.parquet .*has changed"):
        publish(tmp_path / "a", REPO, BRANCH, api=api)
    (dataset(tmp_path / "b") / "manifest.json").unlink()
    with pytest.raises(StoreError, match="incomplete"):
        publish(tmp_path / "b", REPO, BRANCH, api=api)
    assert hub.log == []


def test_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = dataset(tmp_path / "a")
    with socket.socket() as probe:  # a port that is closed again
        probe.bind(("127.0.0.1", 0))
        api = HfApi(endpoint=f"http://127.0.0.1:{probe.getsockname()[1]}", token="hf_alice")
    with pytest.raises(HubError, match=r"Connection refused.*the same command"):
        publish(root, REPO, BRANCH, api=api)
    caplog.clear()
    require_login(api)
    assert "could not be checked" in caplog.text and "Connection refused" in caplog.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for attempt in (lambda: publish(root, REPO, BRANCH, api=api), lambda: require_login(api)):
        with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
            attempt()


def test_login(hub: FakeHub, api: HfApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    require_login(api)
    with pytest.raises(HubError, match=r"there is no token.*leave output\.hf_repo_id out"):
        require_login()
    with pytest.raises(HubError, match=r"refuses the token.*To capture without publishing") as caught:
        require_login(HfApi(endpoint=hub.url, token="hf_mallory"))
    assert "mallory" not in str(caught.value)
    hub.roles["hf_alice"] = "read"
    with pytest.raises(HubError, match="may only read"):
        require_login(api)
    assert caplog.records == []
    hub.fault("GET", "/whoami", status=429)
    require_login(api)
    assert "could not be checked" in caplog.text and caplog.records[0].levelno == logging.WARNING
    assert huggingface_hub.get_token() is None
