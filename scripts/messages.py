"""Lists the messages of the errors that a user can resolve, from the source code, for a page of the site.

python scripts/messages.py
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from qk_sniffer.markdown import plain

PACKAGE = Path(__file__).resolve().parents[1] / "qk_sniffer"

SECTIONS = {
    "ConfigError": "Settings are wrong",
    "SourceError": "A model, a tokenizer or texts cannot be found, loaded or read",
    "CaptureError": "The model runs, and its vectors cannot be captured",
    "StoreError": "A folder cannot be written, read or resumed",
    "HubError": "The Hub",
    "QkSnifferError": "Other errors",
}
"""The title of the section of each class of errors."""

GAP = "…"
"""Stands for a value in a message."""


def messages() -> dict[str, list[str]]:
    """Returns the messages by the class of the error in `SECTIONS`, each once, in alphabetical order."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    section = _section_by_class([node for _, node in nodes if isinstance(node, ast.ClassDef)])
    found: dict[str, set[str]] = {name: set() for name in SECTIONS}
    for path, node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in section:
            is_of_file = node.func.id == "UnreadableError"  # its arguments: file, problem, way out
            texts = (f"{GAP} {text}" for text in _texts(node.args[1:2])) if is_of_file else _texts(node.args)
            found[section[node.func.id]].update(texts)
        elif path.name == "validation.py" and isinstance(node, ast.Yield) and node.value is not None:
            found["ConfigError"].update(_texts([node.value]))
    return {name: sorted(texts, key=lambda text: text.strip(f"{GAP} ").lower()) for name, texts in found.items()}


def _section_by_class(classes: list[ast.ClassDef]) -> dict[str, str]:
    """Returns the class in `SECTIONS` that each class of errors derives from, by name."""
    found = {name: name for name in SECTIONS}
    for _ in classes:  # at most as many levels
        for node in classes:
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in found:
                    found.setdefault(node.name, found[base.id])
    return found


def page() -> str:
    """Returns the page in Markdown."""
    parts = [
        "# Messages",
        f"Errors by what is wrong; {GAP} stands for a value. Each says what to do, or what it needs. "
        "[Troubleshooting](troubleshooting.md) explains the frequent ones.",
    ]
    for name, texts in messages().items():
        parts += [f"## {SECTIONS[name]}", "\n".join(f"- {plain(text)}" for text in texts)]
    return "\n\n".join(parts) + "\n"


def _texts(nodes: list[ast.expr]) -> Iterator[str]:
    """Yields the messages that expressions are, of lists each item. One without words of its own is left out."""
    for node in nodes:
        if isinstance(node, ast.List | ast.Tuple):
            yield from _texts(node.elts)
        else:
            text = re.sub(f"{GAP}+", GAP, " ".join(_text(node).split()))
            if len(text.replace(GAP, "").split()) > 2:
                yield text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return GAP


if __name__ == "__main__":
    print(page())
