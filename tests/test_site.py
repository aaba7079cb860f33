"""The site of `make docs`: it builds without a network, loads nothing from other hosts, and a broken page fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def build(folder: Path, page: str = "") -> subprocess.CompletedProcess[str]:
    """Builds the site into `folder`, with `page` among its pages."""
    config = folder / "mkdocs.yml"
    pages = folder / "docs"
    pages.mkdir()
    for path in (ROOT / "docs").iterdir():
        (pages / path.name).symlink_to(path)
    nav = ""
    if page:
        (pages / "more.md").write_text(page)
        nav = "\nnot_in_nav: more.md"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {pages}\nsite_dir: {folder / 'site'}\n"
        f"hooks: [{ROOT / 'scripts' / 'site_pages.py'}]{nav}\n"
    )
    env = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(tmp_path, "# More\n\nText.\n")
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "api.html", "messages.html", "SUPPORTED.html", "SECURITY.html"} <= pages.keys()
    loaded = r'<(?:script|img|iframe)[^>]* src="([^"]*)"|<link[^>]* rel="(?:stylesheet|preconnect)"[^>]* href="([^"]*)"'
    targets = {one or other for text in pages.values() for one, other in re.findall(loaded, text)}
    assert len(targets) > 5 and not [target for target in targets if "//" in target]


BROKEN = {
    "a page that does not exist": "[there](nowhere.md)",
    "a heading that does not exist": "[there](settings.md#nowhere)",
    "a file of the repository that the site does not have": "[nowhere](../pyproject.toml)",
    "a picture that does not exist": "![there](nowhere.png)",
    "a reference that does not exist": "[there][qk_sniffer.nowhere]",
    "a name that the package does not have": "::: qk_sniffer.nowhere",
}


@pytest.mark.parametrize("page", BROKEN.values(), ids=BROKEN)
def test_a_broken_page_fails(tmp_path: Path, page: str) -> None:
    done = build(tmp_path, f"# More\n\n{page}\n")
    assert done.returncode != 0
    assert re.search(r"nowhere|pyproject", done.stderr + done.stdout)
