"""Tests that a value stays in its place on a page: in text, code, links, cells, YAML and BibTeX."""

import html
import re
from urllib.parse import unquote

import yaml
from hypothesis import example, given
from hypothesis import settings as with_settings
from support.hostile import SECRET, TERMINAL, names, skeleton, tokens

from qk_sniffer.markdown import block, code, in_url, link, plain, table, tex, yaml_string
from qk_sniffer.text import printable


def page(name: str) -> str:
    return "\n".join(
        [
            f"# Vectors of {plain(name)}\n",
            f"Of {plain(name)} and {code(name)}, see {link(plain(name), in_url(name))}",
            f"and {link(code(name), in_url(name))}.",
            f"The end of {plain(name)}\n\n- {plain(name)}\n- {code(name)}\n",
            table(["a", "b"], [[plain(name), code(name)], [link(code(name), in_url(name, safe="/")), "x"]]),
            block("python", f"{name}\n{printable(name)}"),
            "end\n",
        ]
    )


@given(names)
@with_settings(max_examples=50, deadline=None)
@example("a|b\\")
@example("`a`|\\|")
@example("\\`<b>`")
@example(" `` ")
@example(TERMINAL)
def test_a_page_has_the_elements_that_a_harmless_name_gives(name: str) -> None:
    shown = page(name)
    assert skeleton(shown) == skeleton(page("name"))
    assert all(token.attrs["href"].isascii() for token in tokens(shown) if token.type == "link_open")


@given(names)
@with_settings(max_examples=50, deadline=None)
def test_the_reader_sees_the_name_itself(name: str) -> None:
    """Apart from runs of spaces, which HTML shows as one, and escapes of what is not visible."""

    def read(markdown: str) -> str:
        texts = [token.content for token in tokens(f"See {markdown} here.") if token.type in ("text", "code_inline")]
        return "".join(texts)

    visible = printable(name)
    assert read(plain(name)).split() == f"See {visible} here.".split()
    assert read(code(name)).split() == f"See {visible} here.".split()
    (opened,) = [token for token in tokens(link("x", in_url(name))) if token.type == "link_open"]
    assert unquote(str(opened.attrs["href"]), errors="surrogatepass") == name
    cells = [token.content for token in tokens(table(["a"], [[code(name)]])) if token.type == "code_inline"]
    assert cells in ([visible], []) and (cells or html.unescape(code(name)) == f"<code>{visible}</code>")


@given(names)
@with_settings(max_examples=50, deadline=None)
def test_front_matter_and_references(name: str) -> None:
    assert yaml.safe_load(f"a: {yaml_string(name)}\nb: 1\n") == {"a": printable(name), "b": 1}
    assert "\n" not in yaml_string(name) and yaml_string(name).isprintable()
    shown = tex(name)
    assert shown.isprintable() and shown.count("{") == shown.count("}")
    commands = {"textbackslash", "textbraceleft", "textbraceright", "textasciitilde", "textasciicircum"}
    assert set(re.findall(r"\\([a-z]+|.)", shown)) <= commands | set("_&%#$")
    depth = 0
    for each in shown:
        depth += (each == "{") - (each == "}")
        assert depth >= 0


def test_harmless_names_stay_readable() -> None:
    name = "Qwen/Qwen3-0.6B_base v1 (x), it's 50 + 1"
    assert plain(name) == name and code(name) == f"`{name}`" and in_url("a/b_c-d.e~", safe="/") == "a/b_c-d.e~"
    assert code("a|b") == "`a|b`" and table(["x"], [[code("a|b")]]).endswith("| `a\\|b` |\n")
    assert plain(SECRET) == "&#36;&#123;oc.env&#58;HF_TOKEN&#125;" and code(SECRET) == f"`{SECRET}`"
    assert tex("a_b {x} \\input") == r"a\_b \textbraceleft{}x\textbraceright{} \textbackslash{}input"
