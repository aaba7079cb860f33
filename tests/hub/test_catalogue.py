"""Tests the list of branches on main."""

import itertools
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import GitRefInfo, HfApi
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, MakeDataset, client, copied, held, publish, published
from support.jobs import run

from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.hub.catalogue import update_catalogue
from qk_sniffer.store import manifest as manifests

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("waits")]


def page(hub: FakeHub) -> str:
    return held(hub, "main")["README.md"].decode()


def rows(text: str) -> dict[str, list[str]]:
    """Returns the cells of each row by branch."""
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| [")]
    return {match[1]: line for line in cells if (match := re.match(r"\[`(.+?)`\]", line[0])) is not None}


def test_a_row_describes_its_branch(hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "a")
    done = publish(root, REPO, BRANCH, api=api)
    ((name, cells),) = rows(page(hub)).items()
    assert name == BRANCH and cells[0] == f"[`{BRANCH}`]({hub.url}/datasets/{REPO}/tree/{BRANCH})"
    manifest = manifests.read(root)
    size = sum(entry["bytes"] for entry in json.loads(held(hub)["manifest.json"])["files"].values())
    model, texts, split, sampler, heads, number, megabytes, date = cells[1:]
    assert model == manifest["config"]["model"]["name"] and "/" not in model
    assert (texts, split) == ("some-texts.jsonl", "train")
    assert (sampler, heads) == ("`uniform`, base_rate 6", "2 Q + 2 K")
    assert number == f"{manifest['rows']:,}" and megabytes == f"{size / 1e6:.1f} MB"
    day = hub.repositories[REPO].commits[done.commit].date[:10]
    assert date == f"[{day}]({hub.url}/datasets/{REPO}/commit/{done.commit})"
    assert set(held(hub, "main")) == {"README.md"} and "viewer: false" in page(hub)


def test_a_row_names_all_that_a_dataset_has(
    hub: FakeHub, api: HfApi, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    capture = {"capture_values": True, "capture_outputs": True, "layers": [1], "heads": [0, 3]}
    capture |= {"attention": {"enabled": True}, "statistics": {"enabled": True}}
    root = run(checkpoint, texts, tmp_path / "out", capture=capture, dataset={"max_samples": 3})
    publish(root, REPO, BRANCH, api=api)
    assert rows(page(hub))[BRANCH][5] == "2 Q + 2 K + 2 V + 2 O + attention + statistics"
    for name in ("queries (Q)", "values (V)", "outputs (O)", "where the queries\nattend", "statistics"):
        assert name in page(hub)


def test_sources_on_the_hub_are_linked(hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path) -> None:
    publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    repository = hub.repositories[REPO]
    manifest = json.loads(held(hub)["manifest.json"])
    manifest["commits"] |= {"model": "a" * 40, "dataset": "b" * 40}
    manifest["config"]["model"]["name"], manifest["config"]["dataset"]["path"] = "org/model", "org/texts"
    repository.add("two|three", "by hand", {"manifest.json": json.dumps(manifest).encode()})
    update_catalogue(api, REPO)
    assert list(rows(page(hub))) == [BRANCH, r"two\|three"]
    cells = rows(page(hub))[r"two\|three"]
    assert cells[1] == f"[org/model]({hub.url}/org/model/tree/{'a' * 40})"
    assert cells[2] == f"[org/texts]({hub.url}/datasets/org/texts/tree/{'b' * 40})"
    before = page(hub)
    update_catalogue(api, REPO)
    assert page(hub) == before and published(hub, "main") == 2


def test_rows_follow_their_branches(hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a")
    for branch in ("one", "two", "three"):
        publish(first, REPO, branch, api=api)
    assert list(rows(page(hub))) == ["one", "three", "two"]
    before = rows(page(hub))
    asked = len(hub.log)
    del hub.repositories[REPO].branches["one"]
    publish(make_dataset(tmp_path / "b", heads=(1,)), REPO, "two", api=api)
    after = rows(page(hub))
    assert list(after) == ["three", "two"] and after["three"] == before["three"]
    assert after["two"][5] == "1 Q + 1 K" and after["two"][-1] != before["two"][-1]
    commit = hub.repositories[REPO].branches["two"]
    fetched = {path for _, path, _ in hub.log[asked:] if path.endswith("manifest.json")}
    assert fetched == {f"/datasets/{REPO}/resolve/{commit}/manifest.json"}, "unchanged rows stay"


def test_branches_without_a_dataset_are_left_out(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository = hub.create(REPO)
    repository.branches["empty"] = repository.branches["main"]
    repository.add("notes", "by hand", {"notes.txt": b"mine"})
    repository.add("other", "by hand", {"manifest.json": b"[]"})
    repository.add("odd", "by hand", {"manifest.json": b"no json"})
    root = make_dataset(tmp_path / "a")
    manifest = manifests.read(root)
    damaged: list[dict[str, Any]] = [
        {"format": "qk-sniffer/1", "config": {}},
        manifest | {"files": {}},
        manifest | {"files": "none"},
        manifest | {"rows": "many"},
        manifest | {"config": {"sampler": {"type": "unknown", "base_rate": "x"}}},
    ]
    for number, content in enumerate(damaged):
        repository.add(f"damaged-{number}", "by hand", {"manifest.json": json.dumps(content).encode()})
    publish(root, REPO, BRANCH, api=api)
    assert list(rows(page(hub))) == [BRANCH]
    for number in range(len(damaged)):
        assert f"branch damaged-{number} of alice/vectors is not listed: its manifest is damaged" in caplog.text


def test_a_branch_that_is_deleted_while_it_is_listed(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    class Raced(HfApi):
        def list_repo_refs(self, *args: Any, **kwargs: Any) -> Any:
            found = super().list_repo_refs(*args, **kwargs)
            found.branches += [GitRefInfo(name="gone", ref="refs/heads/gone", target_commit="f" * 40)]
            return found

    publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=Raced(endpoint=hub.url, token="hf_alice"))
    assert list(rows(page(hub))) == [BRANCH]


def test_a_list_without_its_end_and_text_that_is_not_utf8(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, "one", api=api)
    mine = page(hub).replace("<!-- qk-sniffer: end of the list -->", "My words.").encode() + b"caf\xe9\n"
    hub.repositories[REPO].add("main", "by hand", {".gitattributes": b"*", "README.md": mine})
    for branch in ("two", "three"):
        publish(root, REPO, branch, api=api)
    new = held(hub, "main")["README.md"]
    assert b"My words." in new and "café\n".encode() in new and new.count(b"end of the list") == 1
    assert list(rows(new.decode().partition("café")[2])) == ["one", "three", "two"]


def test_a_page_that_is_too_large_leaves_the_dataset_published(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPO, {"README.md": bytes(3 << 20)})
    monkeypatch.setattr("qk_sniffer.hub.branch.LARGE", 2 << 20)
    match = r"is on its branch of alice/vectors, but the list .* could not be updated: README\.md .* larger than 2 MB"
    with pytest.raises(HubError, match=match):
        publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    assert published(hub) == 1


def test_a_marker_in_the_text_of_others_is_text(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, "one", api=api)
    copied_marker = "<!-- qk-sniffer: the list of branches, written anew at every publication -->\n\nMy words.\n"
    mine = page(hub).replace("# Vectors", f"{copied_marker}\n# Vectors", 1).encode()
    hub.repositories[REPO].add("main", "by hand", {".gitattributes": b"*", "README.md": mine})
    for branch in ("two", "three"):
        publish(root, REPO, branch, api=api)
        before, _, _ = mine.decode().rpartition("<!-- qk-sniffer: the list")
        assert page(hub).startswith(before) and page(hub).count("| branch |") == 1
    assert list(rows(page(hub))) == ["one", "three", "two"]


def test_a_link_in_the_cache_of_someone_else_is_not_published(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, "one", api=api)
    head = api.repo_info(REPO, repo_type="dataset").sha
    cached = Path(api.hf_hub_download(REPO, "README.md", repo_type="dataset", revision=head))
    (tmp_path / "id_rsa").write_text("a private key")
    cached.unlink()
    cached.symlink_to(tmp_path / "id_rsa")
    with pytest.raises(StoreError, match=r"leads out of the dataset, to .*id_rsa: it is not read"):
        publish(root, REPO, "two", api=api)
    assert "private key" not in page(hub)


@pytest.mark.parametrize("begin", ["", "---\nlicense: mit\n---\n# Mine\n\nSome words.\n"])
def test_text_of_others_is_left_alone(
    begin: str, hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    if begin:
        hub.commit(REPO, {".gitattributes": b"*", "README.md": begin.encode(), "LICENSE": b"mine"})
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, "one", api=api)
    assert page(hub).startswith(begin or "---\npretty_name") and list(rows(page(hub))) == ["one"]
    edited = page(hub).replace("# ", "# My ", 1) + "\nMore words.\n"
    hub.repositories[REPO].add("main", "by hand", hub.repositories[REPO].files("main") | {"README.md": edited.encode()})
    publish(root, REPO, "two", api=api)
    before, _, _ = edited.partition("<!-- qk-sniffer")
    assert page(hub).startswith(before) and page(hub).endswith("<!-- qk-sniffer: end of the list -->\n\nMore words.\n")
    assert list(rows(page(hub))) == ["one", "two"] and page(hub).count("| branch |") == 1


def test_a_row_that_was_not_written_is_written_by_the_next_one(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")
    hub.fault("POST", "/commit/main", status=403)
    message = r"is on its branch of alice/vectors, but the list .*lacks the permission.*Rerun the command of its job"
    with pytest.raises(HubError, match=message):
        publish(root, REPO, "one", api=api)
    assert published(hub, "one") == 1 and "README.md" not in held(hub, "main")
    publish(root, REPO, "two", api=api)
    assert list(rows(page(hub))) == ["one", "two"]
    hub.repositories[REPO].add("main", "by hand", {".gitattributes": b"x"})
    assert not publish(root, REPO, "one", api=api).changed
    assert list(rows(page(hub))) == ["one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [8, 23])
def test_jobs_that_end_together(
    number: int, hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(time, "sleep", lambda seconds: never.wait(seconds / 50))
    source = make_dataset(tmp_path / "a", heads=(0,))
    roots = {f"model-{each:02d}": copied(source, tmp_path / f"{each}") for each in range(number)}
    start, errors = threading.Barrier(len(roots)), []

    def job(branch: str, root: Path) -> None:
        start.wait()
        try:
            publish(root, REPO, branch, api=HfApi(endpoint=hub.url, token="hf_alice"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=job, args=each) for each in roots.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(rows(page(hub))) == sorted(roots)
    assert all(published(hub, branch) == 1 for branch in roots)
    history = [commit.files.get("README.md", b"").decode() for commit in hub.repositories[REPO].history("main")]
    for later, earlier in itertools.pairwise(history):
        assert set(rows(later)) > set(rows(earlier)), "no row is lost, and every commit adds rows"
    statuses = [status for method, path, status in hub.log if method == "POST" and path.endswith("/commit/main")]
    assert statuses.count(412) > 0, "some commits are conflicts"
    assert statuses.count(200) <= number, "at most one commit a job: the Hub allows 128 an hour"


@pytest.mark.slow
def test_the_code_of_the_list_runs(hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path) -> None:
    publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    blocks = re.findall(r"```python\n(.*?)```", page(hub), flags=re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join([*blocks, "print(len(rows), len(vectors), len(positions), len(example_ids))"])
    done = client(hub, tmp_path, "-c", code, token=None)
    assert done.returncode == 0, done.stderr
    number = manifests.read(tmp_path / "a")["files"]["l00h00q/data.parquet"]["rows"]
    assert done.stdout.split() == [str(number)] * 4
