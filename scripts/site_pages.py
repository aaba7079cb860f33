"""Adds pages to the site that `make docs` builds: files from outside of docs/, and the page of messages, which
`messages.py` writes. mkdocs runs this hook.

A page links to files of the repository by their paths from its own folder, as GitHub shows it. On the site, docs/ is
the root, and a file of another folder keeps its path from the root of the repository: `models/ADDING.md`. The links
are rewritten to match. A link to a file of the repository that the site does not have fails the build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import messages
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

OUTSIDE = (
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.ipynb")),
    "examples/README.md",
    "models/SUPPORTED.md",
    "models/ADDING.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/scale.md",
    "benchmarks/results/memory.png",
)

_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s]+)(?P<after>#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files of `OUTSIDE`, and the page of messages, to those of docs/."""
    files.append(File.generated(config, "messages.md", content=messages.page()))
    for name in OUTSIDE:
        path = ROOT / name
        content = path.read_text(encoding="utf-8") if path.suffix == ".md" else path.read_bytes()
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns the text of a page with links as the site has them."""
    place = page.file.src_uri
    return _LINK.sub(
        lambda found: found["before"] + _on_site(found["target"], place) + (found["after"] or ""), markdown
    )


def _on_site(target: str, place: str) -> str:
    """Returns a link of the page at `place` of the site, given the link that it has in the repository."""
    if ":" in target or target.startswith("/"):
        return target
    page = place if place in OUTSIDE else f"docs/{place}"
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return posixpath.relpath(found.removeprefix("docs/"), posixpath.dirname(place) or ".")
