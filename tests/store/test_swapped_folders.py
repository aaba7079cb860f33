"""Swaps what a job writes to in every moment between two of its checks: a link elsewhere, or the folder of another job.

A job checks its claim and then writes. Here a swap follows each check in turn, so that every write after a check meets
it. What the links lead to, and the other job's folder, stay as they are.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.store_cases import HEADS, SAMPLER, Captured, captured_journal, job_facts

from qk_sniffer.config import StatisticsConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.progress import Progress
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.compact import compact
from qk_sniffer.store.compact_statistics import compact_statistics
from qk_sniffer.store.forms import Mark
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import TakenAwayError, hold
from qk_sniffer.store.promote import promote
from qk_sniffer.store.record import remove_unpublished, write_mark, write_unpublished
from qk_sniffer.store.work_folder import discard_work

CORPUS = Captured(num_examples=4, token_ids=False)
FEW = [head for head in HEADS if head.layer == 0 and head.head == 0]
ID = "0123456789abcdef-0123456789abcdef"


def fill(root: Path) -> Path:
    """Writes a data root with a journal, a record, marks, a staged version and a finished one."""
    layout = Layout(root)
    for seed in (1, 0):
        journal = captured_journal(layout.journal(0, 1), Captured(num_examples=4, token_ids=False, seed=seed))
        layout.job_file.write_text(f'{{"job_id": "{ID}"}}')
        written = compact(layout, [journal], FEW, SAMPLER)
        if seed:
            promote(layout, manifests.build(job_facts() | {"source_rows": 4}, written), card=b"# old\n")
    (layout.staging.root / "statistics").mkdir()
    (layout.staging.root / "statistics" / "layer-00.safetensors").write_bytes(b"staged")
    for head in ("l00h01q", "statistics"):  # of an old version
        (root / head).mkdir()
    (root / "l00h01q" / "data.parquet").write_bytes(b"old")
    (root / "statistics" / "layer-00.safetensors").write_bytes(b"old")
    layout.shard_done(0, 1).write_bytes(b"{}")
    layout.progress(0, 1).write_bytes(b"{}")
    layout.unpublished.write_bytes(b"{}")
    return root


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("filled") / "root")


def contents(folder: Path) -> dict[str, bytes | None]:
    """The bytes of everything below a folder, by name; None for folders."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@dataclass
class Disturbed(Claim):
    """The claim of a job. `act` is called after check number `at`."""

    at: int = 0
    act: Callable[[], None] = lambda: None
    checks: int = 0

    def check(self) -> None:
        super().check()
        self.checks += 1
        if self.checks == self.at:
            self.act()


def write_segments(layout: Layout, claim: Claim) -> None:
    shutil.rmtree(layout.journal(0, 1))
    journal = Journal(layout.journal(0, 1), claim.job_id, access=claim)
    with JournalWriter(journal, queue_bytes=1 << 20, segment_bytes=1, access=claim, threads=1) as writer:
        CORPUS.write(writer)


def continue_journal(layout: Layout, claim: Claim) -> None:
    (layout.journal(0, 1) / "00000099.tmp").touch()
    Journal(layout.journal(0, 1), None, access=claim).prepare(claim)


def report_progress(layout: Layout, claim: Claim) -> None:
    Progress(3, file=layout.progress(0, 1), access=claim).close()


def mark_shard(layout: Layout, claim: Claim) -> None:
    write_mark(layout, 0, 1, Mark(job=ID, examples=4, skipped=0), access=claim)


def mark_unpublished(layout: Layout, claim: Claim) -> None:
    write_unpublished(layout, {}, access=claim)
    remove_unpublished(layout, claim)


def stage_heads(layout: Layout, claim: Claim) -> None:
    compact(layout, [Journal(layout.journal(0, 1), access=claim)], FEW, SAMPLER, access=claim)


def stage_statistics(layout: Layout, claim: Claim) -> None:
    config = StatisticsConfig(enabled=True, stages=[])
    compact_statistics(layout.staging, [], FEW, config, {}, num_tokens=0, access=claim)


def promote_staged(layout: Layout, claim: Claim) -> None:
    written = compact(layout, [Journal(layout.journal(0, 1))], FEW, SAMPLER)
    manifest = manifests.build(job_facts() | {"source_rows": 4, "job_id": ID}, written)
    promote(layout, manifest, card=b"# new\n", claim=claim)


def discard(layout: Layout, claim: Claim) -> None:
    discard_work(layout, claim.lock.path, claim)


WORK = ".qk_sniffer/"
SHARD = f"{WORK}shard-00000-of-00001"
JOURNAL = f"{WORK}journal/shard-00000-of-00001"
HEAD = "l00h00q/data.parquet"
STEPS: dict[Callable[[Layout, Claim], None], tuple[str, ...]] = {
    write_segments: (".qk_sniffer", f"{WORK}journal", JOURNAL, f"{JOURNAL}/00000000.tmp", f"{JOURNAL}/00000001.tmp"),
    continue_journal: (f"{WORK}journal", JOURNAL, f"{JOURNAL}/00000099.tmp"),
    report_progress: (".qk_sniffer", f"{SHARD}.progress", f"{SHARD}.progress.tmp"),
    mark_shard: (".qk_sniffer", f"{SHARD}.done", f"{SHARD}.done.tmp"),
    mark_unpublished: (".qk_sniffer", f"{WORK}unpublished.json", f"{WORK}unpublished.json.tmp"),
    stage_heads: (
        *(".qk_sniffer", f"{WORK}journal", JOURNAL, f"{WORK}staging", f"{WORK}staging/examples"),
        *(f"{WORK}staging/examples/data.parquet", f"{WORK}staging/l00h00q", f"{WORK}staging/{HEAD}"),
        *(f"{WORK}staging/l00h00k", f"{WORK}staging/l00h00k/data.parquet"),
    ),
    stage_statistics: (
        *(f"{WORK}staging", f"{WORK}staging/statistics", f"{WORK}staging/statistics/layer-00.safetensors"),
        f"{WORK}staging/statistics/layer-00.safetensors.tmp",
    ),
    promote_staged: (
        *(".qk_sniffer", f"{WORK}staging", f"{WORK}staging/l00h00q", f"{WORK}staging/README.md.tmp"),
        *("l00h00q", HEAD, "l00h00k", "examples", "statistics", "l00h01q", "README.md", "manifest.json"),
        *("manifest.json.tmp", f"{WORK}journal", f"{WORK}staging/manifest.json.tmp"),
    ),
    discard: (f"{WORK}journal", JOURNAL, f"{WORK}staging", f"{WORK}staging/l00h00q", f"{SHARD}.done"),
}
"""The steps of a job that write, and what they write to."""


def run(
    step: Callable[[Layout, Claim], None],
    root: Path,
    act: Callable[[], None],
    at: int,
    ends_with: type[StoreError] = StoreError,
) -> int:
    """Runs a step as the job of `root`; returns how often it has checked its claim. It may end with an error."""
    layout, claim = Layout(root), None
    try:
        with hold(layout.shard_lock(0, 1), "testing") as lock, lock.explaining():
            claim = Disturbed(lock, layout, ID, at=at, act=act)
            step(layout, claim)
    except ends_with as error:
        assert str(root) in str(error)
    assert claim is not None
    return claim.checks


def replace_by_link(place: Path, user: Path) -> None:
    """Puts a link to a copy in the place of a file or folder; to a file or folder of the user if nothing is there."""
    if not place.parent.is_dir():
        return
    user.mkdir()
    target = user / "target"
    if place.is_dir():
        shutil.copytree(place, target)
        place.rename(place.with_name("moved"))
    elif place.suffix:
        target.write_bytes(b"of the user")
        place.unlink(missing_ok=True)
    else:
        target.mkdir()
        (target / "data.parquet").write_bytes(b"of the user")
    place.symlink_to(target)


QUICK = {
    (write_segments, JOURNAL),
    (mark_shard, ".qk_sniffer"),
    (stage_heads, f"{WORK}staging/l00h00q"),
    (stage_statistics, f"{WORK}staging/statistics"),
    (promote_staged, "l00h00q"),
}


def marks(*case: object) -> list[pytest.MarkDecorator]:
    return [] if case in QUICK or case in [(mark_shard,), (stage_heads,)] else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("step", "place"),
    [
        pytest.param(step, place, id=f"{step.__name__}-{place}", marks=marks(step, place))
        for step, places in STEPS.items()
        for place in places
    ],
)
def test_no_step_follows_a_link_that_appears_after_a_check(
    step: Callable[[Layout, Claim], None], place: str, filled: Path, tmp_path: Path
) -> None:
    at = checks = 0
    while checks == at:  # the last run has reached the check that it was disturbed at, and may have ended there
        at += 1
        root, user = tmp_path / str(at) / "root", tmp_path / str(at) / "user"
        shutil.copytree(filled, root)
        before: dict[str, bytes | None] = {}

        def act(root: Path = root, user: Path = user, before: dict[str, bytes | None] = before) -> None:
            replace_by_link(root / place, user)
            before.update(contents(user) if user.exists() else {})

        checks = min(at, run(step, root, act, at))
        assert (contents(user) if user.exists() else {}) == before, f"after check {at}"


@pytest.mark.parametrize("step", [pytest.param(step, id=step.__name__, marks=marks(step)) for step in STEPS])
def test_no_step_writes_to_the_root_of_another_job_that_appears_after_a_check(
    step: Callable[[Layout, Claim], None], filled: Path, tmp_path: Path
) -> None:
    others = tmp_path / "others"
    shutil.copytree(filled, others)
    for path in others.rglob("*"):
        if path.is_file():
            path.write_bytes(b"theirs: " + path.read_bytes())
    expected = contents(others)
    at = checks = 0
    while checks == at:  # the last run has reached the check that it was disturbed at, and may have ended there
        at += 1
        root = tmp_path / str(at) / "root"
        shutil.copytree(filled, root)

        def act(root: Path = root) -> None:
            root.rename(root.with_name("away"))
            shutil.copytree(others, root)

        checks = min(at, run(step, root, act, at, ends_with=TakenAwayError))
        assert checks < at or contents(root) == expected, f"after check {at}"


def test_a_link_to_the_root_itself_is_the_users(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "elsewhere")
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    run(promote_staged, tmp_path / "root", lambda: None, 0)
    assert manifests.read(tmp_path / "elsewhere")["examples"] == 4
