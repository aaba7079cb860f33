"""The files around the code: they parse, name what exists, and call the same checks."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import qk_sniffer

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def commands(target: str) -> list[str]:
    """Returns the commands of a target of the Makefile, without those of its prerequisites."""
    dry = ["make", "--dry-run", "--no-print-directory", "--old-file=install", target]
    return subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def targets(text: str) -> set[str]:
    return set(re.findall(r"(?:`|^|step )make ([a-z-]+)", text, flags=re.MULTILINE))


def test_the_hooks_are_the_commands_of_make_check() -> None:
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == commands("check")
    for hook in repo["hooks"]:
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)
        assert {"id", "name"} <= set(hook)


def test_the_workflow_runs_the_checks_of_the_makefile_and_all_of_ci() -> None:
    workflow = read(".github/workflows/ci.yml")
    assert {"name", "jobs", "permissions"} <= set(workflow)
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == ["make check", "make test", ".ci/run"]


def test_ci_runs_the_commands_of_the_readme_before_it_installs_slurm() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    steps = re.findall(r"^(?:PATH=\$bare )?step make [a-z]+$|apt_install \S+", script, flags=re.MULTILINE)
    assert steps == [
        'apt_install "${needed[@]}"',
        "PATH=$bare step make demo",
        "PATH=$bare step make test",
        "step make check",
        "step make docs",
        "apt_install slurmctld",
        "apt_install chromium",
        "step make slow",
        "step make floor",
    ]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_every_target_that_a_page_names_exists() -> None:
    pages = ["README.md", "CONTRIBUTING.md", ".github/pull_request_template.md", ".pre-commit-config.yaml", ".ci/run"]
    named = targets("".join((ROOT / page).read_text() for page in pages))
    named |= targets("".join(form.read_text() for form in FORMS))
    assert {"demo", "test", "check"} <= named
    existing = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named <= existing


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms(form: Path) -> None:
    content = read(str(form))
    assert set(content) <= {"name", "description", "title", "labels", "assignees", "body"}
    assert content["name"] and content["description"]
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids)
    for field in content["body"]:
        assert field["type"] in {"markdown", "input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
        if field["type"] == "checkboxes":
            assert all(isinstance(option["label"], str) for option in field["attributes"]["options"])


def test_the_citation_names_this_project() -> None:
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert (citation["title"], citation["version"], citation["license"]) == (
        PROJECT["name"],
        PROJECT["version"],
        PROJECT["license"],
    )
    assert citation["message"] and citation["authors"] == [{"name": "The qk-sniffer developers"}]
    assert set(citation) <= {
        *("cff-version", "message", "type", "title", "abstract", "version", "license", "authors", "keywords"),
        *("date-released", "doi", "url", "repository-code", "preferred-citation", "references", "contact"),
    }


def test_the_package_has_the_version_of_the_project() -> None:
    assert qk_sniffer.__version__ == PROJECT["version"]


def test_the_changelog_is_in_the_form_of_keep_a_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Changelog"
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    assert all(re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
