"""Tests publishing to a Hub on loopback with the real client, and reading back with `load_dataset`."""

import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from support.fake_hub import Commit, FakeHub
from support.hub_cases import (
    BRANCH,
    HEADS,
    REPO,
    MakeDataset,
    assert_published,
    assert_whole,
    client,
    contents,
    held,
    publish,
    published,
    vectors_of,
)

from qk_sniffer.errors import ConfigError, HubError, StoreError
from qk_sniffer.hub.publish import Published
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("waits")]


def test_a_dataset_that_is_replaced_is_not_published(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root, calls = make_dataset(tmp_path / "1"), []

    def check() -> None:
        calls.append(published(hub, BRANCH) if REPO in hub.repositories else 0)
        if len(calls) == last:
            raise StoreError("another dataset is there")

    for last in (1, 2, 3):
        calls.clear()
        with pytest.raises(StoreError, match="another dataset is there"):
            publish(root, REPO, BRANCH, api=api, check=check)
        assert len(calls) == last and (REPO not in hub.repositories or published(hub, BRANCH) == 0)


@pytest.mark.slow
def test_two_branches_are_read_back_by_revision(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    roots = {
        "one-texts": make_dataset(tmp_path / "1", model="one"),
        "two": make_dataset(tmp_path / "2", model="two", heads=(1,), layer=1),
    }
    for branch, root in roots.items():
        done = publish(root, REPO, branch, api=api)
        head = hub.repositories[REPO].history(branch)[0]
        assert done == Published(f"{hub.url}/datasets/{REPO}/tree/{branch}", head.id, True)
        assert vectors_of(held(hub, branch)) == vectors_of(contents(root)) and published(hub, branch) == 1
        rows = manifests.read(root)["rows"]
        assert head.title.startswith(f"{branch.removesuffix('-texts')} on some-texts: {rows} rows [")
        assert_whole(held(hub, branch), tmp_path / f"copy of {branch}")
    assert not hub.repositories[REPO].private

    code = f"""
import json
from datasets import get_dataset_config_names, load_dataset
found = {{}}
for branch, head in (("one-texts", "l00h03q"), ("two", "l01h01q")):
    rows = load_dataset({REPO!r}, head, revision=branch, split="train").to_list()
    found[branch] = [get_dataset_config_names({REPO!r}, revision=branch), rows]
streamed = load_dataset({REPO!r}, "l00h00k", revision="one-texts", split="train", streaming=True)
print(json.dumps([found, list(streamed)]))
"""
    done = client(hub, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    found, streamed = json.loads(done.stdout)

    def rows_of(branch: str, head: str) -> Any:
        return pq.read_table(roots[branch] / head / "data.parquet").to_pylist()

    assert found["one-texts"] == [[*HEADS, "examples"], rows_of("one-texts", "l00h03q")]
    assert found["two"] == [["l01h01q", "l01h00k", "examples"], rows_of("two", "l01h01q")]
    assert streamed == rows_of("one-texts", "l00h00k")


def test_unchanged_content_makes_no_commit(hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path) -> None:
    first = publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    uploads, commits = hub.count("POST", "/preupload/"), hub.count("POST", "/commit/")
    root = make_dataset(tmp_path / "b")
    manifests.write(Layout(root), manifests.read(root) | {"timings": {"compact": 123.0}})
    again = publish(root, REPO, BRANCH, api=api)
    assert again == Published(first.url, first.commit, False)
    assert (hub.count("POST", "/commit/"), hub.count("POST", "/preupload/")) == (commits, uploads) == (2, 2)


def test_another_version_replaces_and_deletes(
    api: HfApi, hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    hub.page_size = 2
    publish(make_dataset(tmp_path / "a", heads=(0, 1, 2, 3)), REPO, BRANCH, api=api)
    assert len(held(hub)) == 4 + 2 + 3
    repository = hub.repositories[REPO]
    mine = {"notes.txt": b"mine", "l00h00q/notes": b"mine"}
    earlier = {"statistics/layer-05.safetensors": b"of another layer", "pictures/norms.svg": b"of other vectors"}
    repository.add(BRANCH, "by hand", repository.files(BRANCH) | mine | earlier)
    root = make_dataset(tmp_path / "b", heads=(2,), seed=1)
    done = publish(root, REPO, BRANCH, api=api)
    assert done.changed and published(hub) == 3
    files = held(hub)
    assert set(files) == {*contents(root), *mine} and vectors_of(files) == vectors_of(contents(root))
    assert_whole({name: content for name, content in files.items() if name not in mine}, tmp_path / "copy")


def test_files_of_others_on_a_branch_without_a_dataset_stay(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root, others = make_dataset(tmp_path / "a"), {"l00h00q/data.parquet": b"of another program", "README.md": b"mine"}
    others |= {"pictures/mine.png": b"mine"}
    repository = hub.create(REPO)
    first = repository.branches["main"]
    repository.branches[BRANCH] = first
    repository.add(BRANCH, "by hand", repository.files(BRANCH) | others)
    match = r"has README\.md, l00h00q/data\.parquet, pictures/mine\.png and no manifest\.json"
    with pytest.raises(StoreError, match=match):
        publish(root, REPO, BRANCH, api=api, guard=lambda _: None)
    assert held(hub) == others
    publish(root, REPO, BRANCH, api=api)  # as the user has asked for
    assert set(held(hub)) == {*contents(root), "pictures/mine.png"}

    repository.commits[first].files["README.md"] = b"of the Hub, as it makes one for a new repository"
    publish(root, REPO, "new", api=api, guard=lambda _: None)
    assert set(held(hub, "new")) == {*contents(root)}


def test_files_of_others_on_a_branch_with_a_squashed_history_stay(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    others, squashed = {"l00h00q/data.parquet": b"of another program", "README.md": b"mine"}, "5" * 40
    repository = hub.create(REPO)
    repository.commits[squashed] = Commit(squashed, None, "Super-squash branch", {".gitattributes": b"*"} | others)
    repository.branches[BRANCH] = squashed
    with pytest.raises(StoreError, match=r"has README\.md, l00h00q/data\.parquet and no manifest\.json"):
        publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api, guard=lambda _: None)
    assert held(hub) == others


def test_a_repository_that_is_deleted_meanwhile_is_not_created_again(
    hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    """It was private because its owner has made it private."""

    class Deleted(HfApi):
        def create_commit(self, *args: Any, **kwargs: Any) -> Any:
            hub.repositories.clear()
            raise TimeoutError("no answer")

    hub.create(REPO, private=True)
    with pytest.raises(HubError, match="the Hub has no such repository"):
        publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=Deleted(endpoint=hub.url, token="hf_alice"))
    assert hub.repositories == {}


def test_a_repository_that_is_made_public_during_the_upload_gets_no_commit(
    hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    class Opened(HfApi):
        def preupload_lfs_files(self, *args: Any, **kwargs: Any) -> None:
            super().preupload_lfs_files(*args, **kwargs)
            hub.repositories[REPO].private = False

    api = Opened(endpoint=hub.url, token="hf_alice")
    with pytest.raises(HubError, match=r"output\.private=true, but the repository exists and is public"):
        publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api, private=True)
    assert published(hub) == 0


@pytest.mark.parametrize("rule", [b"l00h*", b"README.md"])
def test_a_branch_that_ignores_files_gets_no_dataset_without_them(
    rule: bytes, hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    hub.create(REPO)
    (first,) = hub.repositories[REPO].commits.values()
    first.files[".gitignore"] = rule
    with pytest.raises(HubError, match=r"a \.gitignore of the branch leaves out .*Remove the file or its rule there"):
        publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    assert published(hub) == 0


def test_a_commit_that_is_taken_back_meanwhile_leaves_no_gap(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    """It had the same files, which the library left out of the commit as unchanged."""
    root, mine = make_dataset(tmp_path / "a"), vectors_of(contents(tmp_path / "a"))
    publish(make_dataset(tmp_path / "b", heads=(1,)), REPO, BRANCH, api=api)
    repository = hub.repositories[REPO]
    before = repository.branches[BRANCH]

    class Moved(HfApi):
        def preupload_lfs_files(self, *args: Any, **kwargs: Any) -> None:
            if kwargs["revision"] == BRANCH:
                repository.add(BRANCH, "by another job", repository.files(BRANCH) | mine)
            super().preupload_lfs_files(*args, **kwargs)
            if kwargs["revision"] == BRANCH:
                repository.branches[BRANCH] = before

    publish(root, REPO, BRANCH, api=Moved(endpoint=hub.url, token="hf_alice"))
    assert published(hub) == 2
    assert_whole(held(hub), tmp_path / "copy")


def test_only_the_dataset_and_its_pictures_are_published(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")
    expected = set(contents(root))
    for stranger in (".qk_sniffer/job.json", "notes.txt", "l09h09q/data.parquet", ".env", "examples/more.parquet"):
        (root / stranger).parent.mkdir(exist_ok=True)
        (root / stranger).write_text("mine")
    publish(root, REPO, BRANCH, api=api)
    assert set(held(hub)) == expected
    (root / "pictures").mkdir()
    (root / "pictures" / "by_bucket.png").write_bytes(b"a picture, Software\0qk-sniffer")
    (root / "pictures" / "by_bucket.svg").write_bytes(b"<dc:title>qk-sniffer</dc:title>")
    (root / "pictures" / "notes.txt").write_text("mine")
    publish(root, REPO, BRANCH, api=api)
    files = held(hub)
    pictures = {"pictures/by_bucket.png", "pictures/by_bucket.svg"}
    assert set(files) == {*expected, *pictures}
    assert "![by bucket](pictures/by_bucket.png)" in files["README.md"].decode()
    assert "\n[by bucket as SVG](pictures/by_bucket.svg)" in files["README.md"].decode()
    assert pictures < json.loads(files["manifest.json"])["files"].keys()
    for name in pictures:
        (root / name).unlink()
    publish(root, REPO, BRANCH, api=api)
    assert set(held(hub)) == expected


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


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAULTS)
def test_a_transient_error_of_the_commit_is_retried(
    name: str, hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, waits: list[float]
) -> None:
    root, fault = make_dataset(tmp_path / "a"), FAULTS[name]
    hub.fault("POST", "/commit/", **fault)
    done = publish(root, REPO, BRANCH, api=api)
    assert done.changed and done.commit == hub.repositories[REPO].branches[BRANCH]
    assert_published(hub, root, tmp_path)
    assert hub.count("PUT", "/lfs/") == 5, "uploaded files are not sent again"
    asked = 700 if fault.get("status") == 429 else 0
    assert len(waits) == fault.get("times", 1) and all(asked + 1 <= wait < asked + 10 for wait in waits)


ENDPOINTS = [
    ("GET", f"/commits/{BRANCH}"),
    ("GET", "/commits/main"),
    ("POST", "/api/repos/create"),
    ("POST", "/branch/"),
    ("GET", "/tree/"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/info/lfs/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", f"/commit/{BRANCH}"),
    ("GET", "/revision/main"),
    ("GET", "/refs"),
    ("HEAD", "/README.md"),
    ("HEAD", "/manifest.json"),
    ("GET", "/manifest.json"),
    ("POST", "/commit/main"),
]


@pytest.mark.few(8)
@pytest.mark.parametrize("how", ["reply", "drop", "lose"])
@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_a_transient_error_elsewhere_is_retried(
    method: str, path: str, how: str, hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    """Two outages in a row, or transient statuses. The test of the commit covers the other faults."""
    root = make_dataset(tmp_path / "a")
    if how == "reply":
        for status in (408, 409, 429, 503):
            hub.fault(method, path, status=status)
    else:
        hub.fault(method, path, how, times=2)
    assert publish(root, REPO, BRANCH, api=api).changed
    assert hub.count(method, path) > 2 or how == "lose", "the fault was met"
    assert hub.take_fault(method, path) is None or how == "lose"
    assert_published(hub, root, tmp_path)


def test_an_outage_ends_after_a_few_attempts(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, waits: list[float]
) -> None:
    hub.fault("POST", "/commit/", times=100)
    with pytest.raises(HubError, match=r"the Hub answers 503.*stays whole in .*/a; rerun the command of its job"):
        publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    assert hub.count("POST", "/commit/") == 5
    assert len(waits) == 4 and all(2.0**n <= wait <= 3 * 2.0**n for n, wait in enumerate(waits))


def test_a_wait_until_a_date(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, waits: list[float]
) -> None:
    then = datetime.now(UTC) + timedelta(seconds=900)
    hub.fault("POST", "/commit/", status=429, Retry_After=format_datetime(then, usegmt=True))
    for odd in ("soon", "Mon, 01 Jan 99999999999 00:00:00 GMT"):
        hub.fault("POST", "/commit/", status=503, Retry_After=odd)
    publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    assert 800 < waits[0] < 910 and 1 < waits[1] < 10 and 2 < waits[2] < 20


def test_a_wait_of_hours_is_refused(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, waits: list[float]
) -> None:
    hub.fault("POST", "/commit/", status=429, Retry_After="86400")
    with pytest.raises(HubError, match="answers 429"):
        publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    assert waits == []


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, None, r"refuses the token .*HF_TOKEN.*hf auth login"),
        (403, None, r"lacks the permission .*another repository"),
        (403, "GatedRepo", r"gated .*ask for access"),
        (404, None, "no such repository, revision or file"),
        (400, None, r"answers 400, .*a fault of the test"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/commit/"), ("POST", "/preupload/"), ("GET", "/commits/")])
def test_a_permanent_error_ends_at_once(
    method: str,
    path: str,
    status: int,
    code: str,
    message: str,
    hub: FakeHub,
    api: HfApi,
    make_dataset: MakeDataset,
    tmp_path: Path,
) -> None:
    root = make_dataset(tmp_path / "a")
    before = contents(root)
    headers = {"X_Error_Code": code} if code else {}
    hub.fault(method, path, status=status, times=100, **headers)
    with pytest.raises(HubError, match=message) as caught:
        publish(root, REPO, BRANCH, api=api)
    text = str(caught.value)
    assert f"published to {REPO}, branch {BRANCH}" in text and f"whole in {root}; rerun the command of its job" in text
    assert "hf_alice" not in text
    assert hub.count(method, path) == 1
    assert contents(root) == before


def test_faults_of_a_single_upload(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, waits: list[float]
) -> None:
    """huggingface_hub wraps the errors of its upload threads. It does not retry these two itself."""
    root = make_dataset(tmp_path / "a")
    hub.fault("PUT", "/lfs/", status=403)
    with pytest.raises(HubError, match="lacks the permission"):
        publish(root, REPO, BRANCH, api=api)
    assert waits == [] and published(hub) == 0
    hub.fault("PUT", "/lfs/", status=409)
    assert publish(root, REPO, BRANCH, api=api).changed
    assert len(waits) == 1
    assert_published(hub, root, tmp_path)


def test_another_writer_in_between(hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path) -> None:
    """A retry reads the branch again: a file that was unchanged before is changed now."""

    raced: list[bool] = []

    class Raced(HfApi):
        def preupload_lfs_files(self, *args: Any, **kwargs: Any) -> None:
            super().preupload_lfs_files(*args, **kwargs)
            if not raced:
                repository = hub.repositories[REPO]
                theirs = {"l00h00k/data.parquet": b"theirs", "l05h00q/data.parquet": b"theirs", "notes.txt": b"theirs"}
                repository.add(BRANCH, "theirs", repository.files(BRANCH) | theirs)
                raced.append(True)

    publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=HfApi(endpoint=hub.url, token="hf_alice"))
    root = make_dataset(tmp_path / "b", seed=1)
    publish(root, REPO, BRANCH, api=Raced(endpoint=hub.url, token="hf_alice"))
    files = held(hub)
    assert files.pop("notes.txt") == b"theirs" and vectors_of(files) == vectors_of(contents(root))
    assert_whole(files, tmp_path / "copy")
    assert published(hub) == 3
    assert [status for _, path, status in hub.log if f"/commit/{BRANCH}" in path] == [200, 412, 200]


def test_another_writer_after_a_lost_answer(hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path) -> None:
    """The later writer wins: a commit that landed is not repeated on top of it."""

    class Raced(HfApi):
        def create_commit(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().create_commit(*args, **kwargs)
            finally:
                if kwargs["revision"] == BRANCH:
                    hub.repositories[REPO].add(BRANCH, "theirs", {"README.md": b"theirs"})

    hub.fault("POST", "/commit/", "lose")
    done = publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=Raced(endpoint=hub.url, token="hf_alice"))
    theirs, ours, _ = hub.repositories[REPO].history(BRANCH)
    assert (theirs.title, done.commit, done.changed) == ("theirs", ours.id, True)


def test_a_dataset_that_is_not_whole_is_not_published(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    with (make_dataset(tmp_path / "a") / "l00h03q" / "data.parquet").open("ab") as file:
        file.write(b"more")
    with pytest.raises(StoreError, match=r"l00h03q/data\.parquet .*has changed"):
        publish(tmp_path / "a", REPO, BRANCH, api=api)
    (make_dataset(tmp_path / "b") / "manifest.json").unlink()
    with pytest.raises(StoreError, match="incomplete"):
        publish(tmp_path / "b", REPO, BRANCH, api=api)
    assert hub.log == []


def test_a_damaged_file_is_not_published(hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "a") / "l00h03q/data.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"l00h03q/data\.parquet .*has changed"):
        publish(tmp_path / "a", REPO, BRANCH, api=api)
    assert published(hub) == 0


def test_progress_is_logged(
    hub: FakeHub,
    api: HfApi,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qk_sniffer.hub.publish._FILES_AT_A_TIME", 3)
    caplog.set_level(logging.INFO, "qk_sniffer")
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, api=api)
    lines = [record.message for record in caplog.records if "files" in record.message]
    assert lines[0].startswith("publishing 7 files, 0.") and lines[0].endswith(f"/tree/{BRANCH}")
    assert [line.split(",")[0] for line in lines[1:]] == ["uploaded 3 files", "uploaded 6 files", "uploaded 7 files"]
    assert "it/s" not in capfd.readouterr().err
    assert_published(hub, root, tmp_path)


def test_two_jobs_that_publish_to_one_branch(hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path) -> None:
    roots = [make_dataset(tmp_path / "a"), make_dataset(tmp_path / "b", heads=(1,), seed=1)]
    start, done = threading.Barrier(2), []

    def job(root: Path) -> None:
        start.wait()
        done.append(publish(root, REPO, BRANCH, api=HfApi(endpoint=hub.url, token="hf_alice")))

    threads = [threading.Thread(target=job, args=(root,)) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2 and published(hub) == 2
    assert vectors_of(held(hub)) in [vectors_of(contents(root)) for root in roots]
    assert_whole(held(hub), tmp_path / "copy")


def test_finalize_publishes_a_dataset_of_a_job_without_the_hub(
    hub: FakeHub, endpoint: str, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    root = make_dataset(tmp_path / "a")
    assert finalize(root, hf_repo_id=REPO, hf_branch=BRANCH) == 0
    assert_published(hub, root, tmp_path)
    assert finalize(root, hf_repo_id=REPO) == 0  # the default branch of its job
    assert published(hub, BRANCH) == 1
    with pytest.raises(ConfigError, match=r"hf_branch is 'main'"):
        finalize(root, hf_repo_id=REPO, hf_branch="main")
    with pytest.raises(HubError, match="the login is that of alice"):
        finalize(root, hf_repo_id="bob/x")
