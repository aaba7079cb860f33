"""Formats lists for messages, and escapes what could control a terminal, hide words or imitate a line of ours."""

import io
import logging
import sys
import unicodedata
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qk_sniffer import text as text_module
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.logs import escape_libraries, logger
from qk_sniffer.text import (
    aligned,
    as_yaml,
    hide,
    hide_in_address,
    hide_in_addresses,
    one_line,
    path_text,
    printable,
    printable_lines,
    python_literal,
    say,
    say_text,
    shortened,
)

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\nwhole: 2 heads\x7f\x9b31m\u202e\u2066\u200b\u2028\ud800\ufeff\u00a0\U000e0041"
"""A name with every kind of character that must not reach a terminal."""

ESCAPED = r"\x1b]0;owned\x07\x1b[2J\r\nwhole: 2 heads\x7f\x9b31m\u202e\u2066\u200b\u2028\ud800\ufeff\xa0\U000e0041"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a, b"),
        (["a", "b", "c"], "a, b and 1 more"),
        (["a", "b", *map(str, range(2000))], "a, b and 2,000 more"),
    ],
)
def test_a_long_list_ends_with_the_number_of_the_others(names: list[str], expected: str) -> None:
    assert shortened(names, 2) == expected


def test_only_visible_characters_are_left() -> None:
    assert printable(HOSTILE) == ESCAPED and printable(ESCAPED) == ESCAPED
    assert printable("café 日本 naïve-model/v1.5 (x) 🙂") == "café 日本 naïve-model/v1.5 (x) 🙂"
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    for each in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(each) in hidden:
            assert printable(each).isascii() and printable(each).isprintable()


@given(st.text(st.characters()))
@settings(deadline=None)
def test_every_text_becomes_one_line_for_every_stream(text: str) -> None:
    assert len(printable(text).splitlines()) <= 1
    assert printable_lines(f"{text}\n{text}").count("\n") == 2 * text.count("\n") + 1
    assert eval(python_literal(text)) == text
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say(text, text, to=stream)
    stream.flush()
    assert stream.buffer.getvalue().count(b"\n") == 2  # type: ignore[attr-defined]


def test_tables_messages_and_logs_hold_no_foreign_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert aligned([("name", "rows"), (HOSTILE, "1")]).splitlines()[1] == f"{ESCAPED}  1"
    assert str(StoreError(f"{HOSTILE} is damaged", "  - way out")) == f"{ESCAPED} is damaged\n  - way out"
    assert str(ConfigError([HOSTILE])) == f"1 problem in the configuration:\n  - {ESCAPED}"
    say(HOSTILE, "end")
    say_text(StoreError(HOSTILE, "end"))
    assert capsys.readouterr().out == f"{ESCAPED}\nend\n" * 2
    log = logger("qk_sniffer.test")
    log.warning("%s has %d rows of %.1f", HOSTILE, 3, 0.25)
    log.error("%s", ConfigError([HOSTILE]))
    log.warning("%s", OSError(HOSTILE))
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError:
        log.exception("Unexpected error:")
    log.debug("%s", HOSTILE)
    assert caplog.messages[:3] == [f"{ESCAPED} has 3 rows of 0.2", str(ConfigError([HOSTILE])), ESCAPED]
    assert caplog.messages[3].endswith("whole: 2 heads" + ESCAPED.partition("whole: 2 heads")[2])
    assert "Traceback" in caplog.messages[3] and printable_lines(caplog.text) == caplog.text
    assert [record.name for record in caplog.records] == ["qk_sniffer.test"] * 4
    assert {record.module for record in caplog.records} == {"test_text"}
    assert logging.getLogger("qk_sniffer.test").isEnabledFor(logging.WARNING)


def test_what_libraries_log_warn_and_raise_is_escaped(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    escape_libraries()
    library = logging.getLogger("some_library")
    library.warning("the key %s is not known", HOSTILE)
    library.warning("first\nwhole: 2 heads")
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError:
        library.exception("failed")
    sys.excepthook(RuntimeError, RuntimeError(HOSTILE), None)
    shown = caplog.text + warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "x.py", 1, "code")
    shown += capsys.readouterr().err
    assert shown.count("0;owned") == 4 and printable_lines(shown) == shown
    assert not [line for line in shown.splitlines() if line.startswith("whole: 2 heads")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("for url 'https://cdn.hf.co/a/b?Policy=x&Signature=y_~*' again", "for url 'https://cdn.hf.co/a/b?***' again"),
        ("Cannot access: https://cdn.hf.co/a?b=c.", "Cannot access: https://cdn.hf.co/a?***."),
        ("[https://a/b?c=d, HTTPS://e/f?g]", "[https://a/b?***, HTTPS://e/f?***]"),
        ("https://me:word@host/a?b https://word@host", "https://***@host/a?*** https://***@host"),
        ("https://u:a'b@c@host/x?sig=a'b'", "https://***@host/x?***'"),
        ("is https://huggingface.co the Hub? See https://huggingface.co/docs", None),
        ("me@host: a?b", None),
    ],
)
def test_the_login_and_the_query_of_an_address_are_not_shown(text: str, shown: str | None) -> None:
    shown = text if shown is None else shown
    assert printable(text) == shown and printable(shown) == shown


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("a=https://host/Tok3nTok3n/x.jsonl", "a=https://host/***/x.jsonl"),
        ("a=[https://host:1/dl/tok,https://b/x.csv]", "a=[https://host:1/***,https://b/x.csv]"),
        ("a='https://me:pass@host/x.csv?q[0]=token'", "a='https://***@host/x.csv?***'"),
        ("a=\"ftp://u:a'SECRET@host/x.csv?b='SECRET\" b", 'a="ftp://***@host/x.csv?***" b'),
        ("a={train:[https://host/dl/tok],test:b}", "a={train:[https://host/***}"),
        (
            "a=simplecache::https://host/dl/x.csv::zip://in/y.csv",
            "a=simplecache::https://host/***/x.csv::zip://in/y.csv",
        ),
        ("a=hf://datasets/org/name/x.csv b=file:///home/x.csv", "a=hf://datasets/org/name/x.csv b=file:///home/x.csv"),
        ("a=/data/texts.jsonl b=org/name c=C:/x", "a=/data/texts.jsonl b=org/name c=C:/x"),
    ],
)
def test_messages_hide_what_may_be_secret_in_an_address(
    argument: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "_hidden", ())
    hide_in_addresses(argument)
    assert printable(argument) == shown
    assert printable("the datasets of https://huggingface.co/datasets/org") == (
        "the datasets of https://huggingface.co/datasets/org"
    )


def test_an_address_of_the_hub_with_a_login_is_hidden_and_one_without_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_hidden", ())
    hide_in_address("hf://datasets/org/name@0123456789abcdef/a.jsonl")
    hide_in_address("hf://some-user:a-pa55word@datasets/org/name/a.jsonl?key=a-5ecret-key")
    plain = "hf://datasets/org/name@0123456789abcdef/a.jsonl cannot be read"
    assert printable(plain) == plain
    said = printable("hf://some-user:a-pa55word@datasets/org/name/a.jsonl?key=a-5ecret-key: Invalid")
    assert "a-pa55word" not in said and "a-5ecret-key" not in said and "some-user" not in said


def test_a_library_may_quote_a_part_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_hidden", ())
    hide_in_address("HTTPS://Host/dl/hf_Tok3nTok3nTok3n/fineweb-edu-2024/")
    path = "/dl/hf_Tok3nTok3nTok3n/fineweb-edu-2024/x"
    for quoted in (f"https://host{path}", f"404 for {path}", "hf_Tok3nTok3nTok3n is no folder"):
        assert "Tok3n" not in printable(quoted)
    assert printable("outputs/fineweb-edu-2024") == "outputs/fineweb-edu-2024", "a name, which may be that of a dataset"


def test_names_that_are_stored_do_not_depend_on_the_secrets_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint has them: the job would not be resumed in a process with another token."""
    monkeypatch.setattr(text_module, "_hidden", ())
    hide("a-secret")
    assert path_text("a-secret\x1b") == "a-secret\\x1b" and printable("a-secret\x1b") == "***\\x1b"


def test_a_secret_is_hidden_before_a_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_hidden", ())
    hide("a-secret-token")
    cut = one_line(f"no file\n{'x' * 20} a-secret-token and more", 36)
    assert cut == f"no file {'x' * 20} *** ..." and one_line("as it is", 8) == "as it is"


@pytest.mark.parametrize(
    "value",
    [None, True, False, 3, 0.5, "text", "null", "it's", [1, None, "a"], {"a": [True], "b": {"c": None}}, [], {}],
)
def test_a_value_is_shown_as_a_yaml_file_gives_it(value: object) -> None:
    assert OmegaConf.create(f"value: {as_yaml(value)}") == {"value": value}
