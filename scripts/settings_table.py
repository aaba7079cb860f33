"""Prints the table of settings in docs/settings.md, from the fields of the config.

python scripts/settings_table.py
"""

from qk_sniffer.config import Setting, settings


def table() -> str:
    """The table in Markdown: one row a setting, with its default and its help."""
    rows = [f"| `{each.key}` | {_default(each)} | {_escaped(each.help)} |" for each in settings()]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def _escaped(text: str) -> str:
    # Markdown would read `<branch>` as a tag and drop it.
    return text.replace("<", r"\<")


def _default(setting: Setting) -> str:
    if isinstance(setting.default, bool):
        return str(setting.default).lower()
    return "null" if setting.default is None else str(setting.default)


if __name__ == "__main__":
    print(table())
