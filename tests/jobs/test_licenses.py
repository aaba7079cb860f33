"""The licenses and languages in the cards of a dataset's sources."""

from pathlib import Path

import pytest
from support.fake_hub import FakeHub

from qk_sniffer.hub.revisions import Kind
from qk_sniffer.jobs.licenses import stated_terms

pytestmark = pytest.mark.floor


def test_on_the_hub_at_a_commit(hub: FakeHub, endpoint: str) -> None:
    card = b"---\nlicense: mit\nlanguage:\n- en\n- de\n- English\n---\n# Texts\n"
    commit = hub.commit("org/texts", {"README.md": card})
    hub.commit("org/texts", {"README.md": b"---\nlicense: other\n---\n"})
    assert stated_terms("dataset", "org/texts", commit) == {"license": ["mit"], "language": ["en", "de"]}
    assert stated_terms("dataset", "org/texts", "0" * 40) == {"license": [], "language": []}


def test_here(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\nlanguage: en\n---\n")
    assert stated_terms("model", str(tmp_path), None) == {"license": ["mit", "apache-2.0"], "language": ["en"]}
    assert stated_terms("dataset", "pydoc", None) == {"license": ["psf-2.0"], "language": ["en"]}


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_card_of_someone_else_that_is_a_file_elsewhere(tmp_path: Path, kind: Kind) -> None:
    secret, folder = tmp_path / "home" / "secret.md", tmp_path / "received"
    secret.parent.mkdir()
    folder.mkdir()
    secret.write_text("---\nlicense: secret\n---\n")
    (folder / "README.md").symlink_to(secret)
    assert stated_terms(kind, str(folder), None) == {"license": [], "language": []}
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("notes.md")
    (folder / "notes.md").write_text("---\nlicense: mit\n---\n")
    assert stated_terms(kind, str(folder), None) == {"license": ["mit"], "language": []}


def test_the_card_of_a_fine_tune_may_be_that_of_its_base(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "tuned"
    base.mkdir()
    folder.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "README.md").symlink_to(base / "README.md")
    assert stated_terms("model", str(folder), None) == {"license": [], "language": []}, "it is no checkpoint yet"
    (base / "config.json").write_text('{"model_type": "bert"}')
    assert stated_terms("model", str(folder), None) == {"license": ["mit"], "language": []}


@pytest.mark.parametrize("card", [None, "no front matter", "---\nlicense: {\n---\n", "---\nlicense: 7\n---\n"])
def test_where_nothing_is_known(card: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert stated_terms("model", str(tmp_path), None) == {"license": [], "language": []}
    assert stated_terms("dataset", "org/nothing", "0" * 40) == {"license": [], "language": []}


def test_cards_without_measure(tmp_path: Path) -> None:
    """The record of a job has limits: one that goes beyond them cannot be read back."""
    many = ", ".join(["mit"] * 500)
    (tmp_path / "README.md").write_text(f"---\nlicense: [{'a' * 20_000}, {many}]\nlanguage: en\n---\n")
    assert stated_terms("model", str(tmp_path), None) == {"license": ["mit"] * 100, "language": ["en"]}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * 2_000_000)
    assert stated_terms("model", str(tmp_path), None) == {"license": [], "language": []}
