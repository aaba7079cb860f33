"""`output.resume_from_hub`: on a new machine, a job continues the dataset of its branch, and fetches what it needs."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import segmented
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, assert_whole, held, published
from support.jobs import TEXTS, captured_only, hashes, run

import qk_sniffer
from qk_sniffer.capture.capture import Capture
from qk_sniffer.errors import HubError, SourceError, StoreError

pytestmark = pytest.mark.floor

HEADS = {f"{head}/data.parquet" for head in ("l00h00q", "l00h03q", "l00h00k", "l00h01k")}
EXAMPLES = "examples/data.parquet"


class Machine:
    """A machine with its own data root and cache. All machines have the same texts."""

    def __init__(self, hub: FakeHub, checkpoint: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.hub, self.checkpoint, self.folder, self.patch = hub, checkpoint, folder, patch
        self.root = folder / "root"
        self.texts = folder / "some-texts.jsonl"
        self.captured: list[int] = []
        folder.mkdir()
        self.write(TEXTS)

    def write(self, texts: list[str]) -> None:
        self.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def job(self, max_samples: int, *, killed: bool = False, **more: dict[str, Any]) -> set[str]:
        """Runs the job over so many texts. Returns the files that it fetched, and stores which texts it captured.

        With `killed`, the job ends between the capture and the dataset.
        """
        sections: dict[str, dict[str, Any]] = {
            "dataset": {"max_samples": max_samples},
            "capture": {"layers": [0], "heads": [0, 3]},
            "inference": {"batch_size": 1},
            "output": {"hf_repo_id": REPO, "hf_branch": BRANCH, "resume_from_hub": True},
        }
        sections = {name: sections.get(name, {}) | more.get(name, {}) for name in {*sections, *more}}
        start, self.captured = len(self.hub.log), []
        with self._watched() as patch:
            if killed:
                captured_only(self.checkpoint, self.texts, self.root, patch, **sections)
            else:
                run(self.checkpoint, self.texts, self.root, **sections)
        gets = [path for method, path, _ in self.hub.log[start:] if method == "GET"]
        found = [re.fullmatch(rf"/datasets/{REPO}/resolve/[^/]+/(.+)", path) for path in gets]
        return {match[1] for match in found if match is not None} - {"README.md"}  # the list of main

    @property
    def noted(self) -> str:
        """The commit in the snapshot of the data root."""
        note = json.loads((self.root / ".sniff_snapshot.json").read_bytes())
        assert (note["repo_id"], note["branch"]) == (REPO, BRANCH)
        return str(note["commit"])

    @contextmanager
    def _watched(self) -> Iterator[pytest.MonkeyPatch]:
        real: Callable[..., None] = Capture.run

        def capture(self_: Capture, plan: Any) -> None:
            self.captured += [example.index for example in plan.examples]
            real(self_, plan)

        with self.patch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.folder / "cache"))
            patch.setattr(Capture, "run", capture)
            yield patch


@pytest.fixture
def machine(
    hub: FakeHub, endpoint: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Machine]:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    return lambda name: Machine(hub, checkpoint, tmp_path / name, monkeypatch)


MakeMachine = Callable[[str], Machine]


def head(hub: FakeHub) -> str:
    return hub.repositories[REPO].branches[BRANCH]


def files(machine: Machine) -> dict[str, str]:
    """The digests of the dataset's files."""
    return {name: digest for name, digest in hashes(machine.root).items() if name != ".sniff_snapshot.json"}


def test_a_finished_dataset_is_not_made_again(hub: FakeHub, machine: MakeMachine) -> None:
    first, second = machine("first"), machine("second")
    first.job(8)
    assert len(first.captured) == 8 and first.noted == head(hub)
    assert second.job(8) == {"manifest.json", EXAMPLES} and second.captured == []
    assert {path.name for path in second.root.iterdir()} == {".sniff_snapshot.json"} and second.noted == head(hub)
    assert second.job(8) == set(), "nothing is fetched twice"
    assert first.job(8) == set() and published(hub) == 1


@pytest.mark.slow
def test_it_grows_on_another_machine(hub: FakeHub, machine: MakeMachine, tmp_path: Path) -> None:
    first, second, undisturbed = machine("first"), machine("second"), machine("undisturbed")
    first.job(8)
    assert second.job(12) >= HEADS | {"manifest.json", EXAMPLES}
    assert sorted(second.captured) == [8, 9, 10, 11]
    undisturbed.job(12, output={"hf_repo_id": None, "resume_from_hub": False})
    assert files(second) == files(undisturbed)
    assert second.noted == head(hub) and published(hub) == 2
    assert_whole(held(hub), tmp_path / "copy")
    # The first machine has eight examples, the branch twelve: the job continues the branch.
    assert first.job(14) >= HEADS and sorted(first.captured) == [12, 13]
    assert second.job(14) == {"manifest.json", EXAMPLES} and second.captured == []
    assert published(hub) == 3


def test_segments_are_published_read_from_the_branch_and_grow_there(
    hub: FakeHub, machine: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, Any] = {
        "dataset": segmented.COLUMNS,
        "capture": {"layers": [0], "heads": [0], "capture_segments": True},
        "sampler": {"segments": ["assistant", "user"]},
    }
    first, second, undisturbed = machine("first"), machine("second"), machine("undisturbed")
    for one in (first, second, undisturbed):
        segmented.write(one.texts)
    first.job(8, **wanted)
    assert second.job(12, **wanted) >= {"l00h00q/data.parquet", EXAMPLES} and sorted(second.captured) == [8, 9, 10, 11]
    undisturbed.job(12, **wanted, output={"hf_repo_id": None, "resume_from_hub": False})
    assert files(second) == files(undisturbed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    rows, names = dataset.vectors(0, 0, "q"), dataset.segments(0, 0, "q")
    expected = [segmented.names_of(index) for index in range(12)]
    assert names.tolist() == [
        expected[example][position]
        for example, position in zip(rows.example_ids.tolist(), rows.positions.tolist(), strict=True)
    ]
    assert {*names} == {"assistant", "user"}


@pytest.mark.slow
def test_statistics_are_published_read_from_the_branch_and_grow_there(
    hub: FakeHub, machine: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = {"enabled": True, "stages": ["pre", "post"], "skip_tokens": 2}
    wanted: dict[str, Any] = {"capture": {"layers": [0, 2], "statistics": statistics}, "sampler": {"type": "none"}}
    local = {"output": {"hf_repo_id": None, "resume_from_hub": False}}
    first, second, undisturbed = machine("first"), machine("second"), machine("undisturbed")
    first.job(8, **wanted)
    names = {f"statistics/layer-0{layer}.safetensors" for layer in (0, 2)}
    assert names <= held(hub).keys()
    assert second.job(8, **wanted) == {"manifest.json", EXAMPLES} and second.captured == []
    assert second.job(12, killed=True, **wanted) >= names
    assert sorted(second.captured) == [8, 9, 10, 11]
    assert second.job(12, **wanted) & names == set(), "nothing is fetched twice"
    undisturbed.job(8, **wanted, **local)
    undisturbed.job(12, **wanted, **local)
    assert files(second) == files(undisturbed) and published(hub) == 2
    assert_whole(held(hub), tmp_path / "copy")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    found = dataset.statistics(2, "k", "pre")
    expected = qk_sniffer.open_dataset(undisturbed.root).statistics(2, "k", "pre")
    for name, values in vars(expected).items():
        assert np.array_equal(getattr(found, name), values), name
    assert set(found.count) == {sum(len(text) - 2 for text in TEXTS[:12])}
    card = held(hub)["README.md"].decode()
    (reading,) = [code for code in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL) if ".statistics(" in code]
    shown: dict[str, Any] = {}
    exec(compile(reading, "README.md", "exec"), shown)
    assert np.array_equal(shown["mean"], dataset.statistics(0, "q", "pre").mean)


@pytest.mark.slow
def test_killed_while_it_grows(hub: FakeHub, machine: MakeMachine) -> None:
    first, second = machine("first"), machine("second")
    first.job(8)
    assert second.job(12, killed=True) >= HEADS
    assert second.job(12) & HEADS == set(), "nothing is fetched twice"
    assert second.captured == [] and published(hub) == 2
    undisturbed = machine("undisturbed")
    undisturbed.job(12, output={"hf_repo_id": None, "resume_from_hub": False})
    assert files(second) == files(undisturbed)


@pytest.mark.slow
def test_shards_grow_it_together(hub: FakeHub, machine: MakeMachine, tmp_path: Path) -> None:
    first, second = machine("first"), machine("second")
    first.job(8)
    second.job(12, shard={"index": 0, "count": 2})
    captured = second.captured
    second.job(12, shard={"index": 1, "count": 2})
    assert sorted(captured + second.captured) == [8, 9, 10, 11] and published(hub) == 2
    assert_whole(held(hub), tmp_path / "copy")


@pytest.mark.slow
def test_another_configuration_is_refused(hub: FakeHub, machine: MakeMachine) -> None:
    first, second = machine("first"), machine("second")
    first.job(8)
    before = dict(held(hub))
    with pytest.raises(
        StoreError, match=rf"{REPO}, branch {BRANCH} holds .* another configuration:\n  - sampler\.seed: 0 there, 1 now"
    ) as caught:
        second.job(8, sampler={"seed": 1})
    assert "output.hf_branch" in str(caught.value)
    second.write([TEXTS[0], "abc", *TEXTS[2:]])
    with pytest.raises(
        SourceError, match=rf"example 1 of the dataset .* is not the text that {REPO}, branch {BRANCH} was made"
    ):
        second.job(8)
    with pytest.raises(
        StoreError, match=rf"{REPO}, branch {BRANCH} is finished with 8 examples of the dataset, and only 6"
    ):
        machine("third").job(6)
    assert held(hub) == before and second.captured == [] and not second.root.exists()
    # Also if the data root itself is finished, with the requested examples.
    third = machine("another")
    third.job(8, sampler={"seed": 1}, output={"hf_repo_id": None, "resume_from_hub": False})
    with pytest.raises(StoreError, match=r"another configuration"):
        third.job(8, sampler={"seed": 1})
    third.job(8, sampler={"seed": 1}, output={"overwrite": True})
    assert len(third.captured) == 8 and held(hub) != before


@pytest.mark.slow
def test_without_a_dataset_on_the_branch_the_job_starts_from_nothing(hub: FakeHub, machine: MakeMachine) -> None:
    repository = hub.create(REPO)
    created = repository.branches["main"]
    first = machine("first")
    first.job(4)
    assert len(first.captured) == 4 and published(hub) == 1
    repository.branches[BRANCH] = created  # the state after a kill in the middle of an upload
    second = machine("second")
    second.job(4)
    assert len(second.captured) == 4 and published(hub) > 0


def test_without_the_hub_there_is_an_error(hub: FakeHub, machine: MakeMachine) -> None:
    first = machine("first")
    hub.fault("GET", "/revision/", times=100)
    with pytest.raises(HubError, match=rf"{REPO} at '{BRANCH}' cannot be read from the Hub: the Hub answers 503"):
        first.job(4)
    assert first.captured == [] and not first.root.exists()


@pytest.mark.slow
def test_what_another_machine_has_added_meanwhile_is_not_taken_back(hub: FakeHub, machine: MakeMachine) -> None:
    first, second, third = machine("first"), machine("second"), machine("third")
    first.job(4)
    second.job(6, killed=True)
    third.job(8)
    with pytest.raises(StoreError, match=rf"not published: {REPO}, branch {BRANCH} has 8 examples .* has 6\. Raise"):
        second.job(6)
    assert published(hub) == 2
    second.job(10)
    assert sorted(second.captured) == [8, 9] and published(hub) == 3


@pytest.mark.slow
def test_what_was_made_here_without_the_hub_does_not_replace_another_dataset(
    hub: FakeHub, machine: MakeMachine
) -> None:
    first = machine("first")
    first.job(8)
    alone: dict[str, Any] = {"hf_repo_id": None, "resume_from_hub": False, "overwrite": True}
    first.job(8, sampler={"seed": 1}, output=alone)  # the snapshot does not cover this
    with pytest.raises(StoreError, match="another configuration"):
        first.job(8, sampler={"seed": 1})
    second = machine("second")
    second.write([TEXTS[0], "abc", *TEXTS[2:]])
    second.job(8, output=alone | {"overwrite": False})
    with pytest.raises(StoreError, match=r"not published: .* was made from other texts than"):
        second.job(8)
    third = machine("third")
    third.job(4, sampler={"seed": 1}, shard={"index": 0, "count": 2}, output=alone | {"overwrite": False})
    with pytest.raises(StoreError, match="another configuration"):
        third.job(4, sampler={"seed": 1}, shard={"index": 1, "count": 2})
    assert published(hub) == 1
    # Fewer rows than the branch, but made here: the job continues the branch.
    fourth = machine("fourth")
    fourth.job(2, output=alone | {"overwrite": False})
    for _ in range(2):
        fourth.job(8)
        assert fourth.captured == [] and published(hub) == 1
    fifth = machine("fifth")
    fifth.write(["abc", *TEXTS[1:]])
    fifth.job(2, output=alone | {"overwrite": False})
    before = files(fifth)
    fifth.write(TEXTS)
    with pytest.raises(StoreError, match=r"has more examples than .* and was made from other texts"):
        fifth.job(10)
    assert files(fifth) == before and published(hub) == 1


@pytest.mark.slow
def test_a_damaged_copy_is_fetched_again(hub: FakeHub, machine: MakeMachine, tmp_path: Path) -> None:
    machine("first").job(8)
    second = machine("second")
    second.job(12, killed=True)
    for name in ("l00h03q/data.parquet", "manifest.json"):
        (copy,) = second.folder.glob(f"cache/**/snapshots/*/{name}")
        copy.write_bytes(copy.read_bytes()[:-1])
    assert second.job(12) >= {"l00h03q/data.parquet"} and second.captured == []
    assert_whole(held(hub), tmp_path / "copy")


@pytest.mark.slow
def test_a_base_that_is_gone_can_be_replaced(hub: FakeHub, machine: MakeMachine) -> None:
    machine("first").job(8)
    second = machine("second")
    second.job(12, killed=True)
    shutil.rmtree(second.folder / "cache")
    del hub.repositories[REPO]
    with pytest.raises(HubError, match=rf"{REPO} at '{BRANCH}' cannot be read from the Hub"):
        second.job(12)
    second.job(12, output={"overwrite": True})
    assert len(second.captured) == 12 and published(hub) == 1


def test_a_list_that_was_not_written_is_written_by_who_resumes(hub: FakeHub, machine: MakeMachine) -> None:
    hub.fault("POST", "/commit/main", status=403)
    with pytest.raises(HubError, match="list of branches"):
        machine("first").job(4)
    assert "README.md" not in held(hub, "main")
    machine("second").job(4)
    assert BRANCH in held(hub, "main")["README.md"].decode()


def hostile(hub: FakeHub, **changes: bytes) -> dict[str, bytes]:
    """Replaces files of the branch by name. Returns all of its files."""
    found = dict(hub.repositories[REPO].files(BRANCH))
    found |= changes
    hub.commit(REPO, found, BRANCH)
    return found


def test_a_list_of_examples_of_another_size_is_not_fetched(hub: FakeHub, machine: MakeMachine) -> None:
    machine("first").job(8)
    hostile(hub, **{EXAMPLES: held(hub)[EXAMPLES] + bytes(1 << 20)})
    second = machine("second")
    start = len(hub.log)
    with pytest.raises(StoreError, match=r"examples/data\.parquet of .* bytes instead of .*: it is not fetched"):
        second.job(12)
    assert not [1 for method, path, _ in hub.log[start:] if method == "GET" and path.endswith(EXAMPLES)]
    assert not second.root.exists()


def test_a_damaged_copy_is_not_replaced_by_a_file_of_another_size(hub: FakeHub, machine: MakeMachine) -> None:
    machine("first").job(8)
    second = machine("second")
    second.job(12, killed=True)
    (copy,) = second.folder.glob(f"cache/**/snapshots/*/{EXAMPLES}")
    copy.write_bytes(copy.read_bytes()[:-1])
    head_ = hub.repositories[REPO].history(BRANCH)[0]
    head_.files[EXAMPLES] += bytes(1 << 20)  # a Hub that answers otherwise for the same commit
    with pytest.raises(StoreError, match="it is not fetched"):
        second.job(12)


def test_a_branch_that_lists_no_examples_is_neither_added_to_nor_replaced(hub: FakeHub, machine: MakeMachine) -> None:
    machine("first").job(8)
    manifest = json.loads(held(hub)["manifest.json"])
    del manifest["files"][EXAMPLES]
    found = hostile(hub, **{"manifest.json": json.dumps(manifest).encode(), EXAMPLES: bytes(1 << 20)})
    second = machine("second")
    start = len(hub.log)
    with pytest.raises(StoreError, match=rf"{EXAMPLES} of .* is missing or damaged"):
        second.job(12)
    third = machine("third")
    third.job(8, output={"hf_repo_id": None, "resume_from_hub": False})
    with pytest.raises(StoreError, match=rf"{EXAMPLES} of .* is not listed in manifest\.json"):
        third.job(8)
    assert not [1 for method, path, _ in hub.log[start:] if method == "GET" and path.endswith(EXAMPLES)]
    assert hub.repositories[REPO].files(BRANCH) == found


@pytest.mark.slow
def test_attention_summaries_are_published_read_from_the_branch_and_grow_there(machine: MakeMachine) -> None:
    wanted: dict[str, Any] = {"capture": {"attention": {"enabled": True, "top_k": 3}}}
    first, second, undisturbed = machine("first"), machine("second"), machine("undisturbed")
    first.job(3, **wanted)
    on_branch = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    positions = on_branch.attention_summary(0, 3).positions
    np.testing.assert_array_equal(positions, on_branch.vectors(0, 3, "q").positions)
    assert {"l00h00a/data.parquet", "l00h03a/data.parquet"} <= second.job(5, **wanted)
    assert sorted(second.captured) == [3, 4]
    undisturbed.job(5, **wanted, output={"hf_repo_id": None, "resume_from_hub": False})
    assert files(second) == files(undisturbed)
