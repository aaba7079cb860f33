"""The page on troubleshooting quotes messages as the code has them, and the page of messages has every kind."""

import re
from pathlib import Path

import messages
import pytest
from markdown_it import MarkdownIt

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `(.+?)` \| ", PAGE, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for of_kind in messages.messages().values() for text in of_kind]


@pytest.mark.slow
@pytest.mark.parametrize("quoted", QUOTED)
def test_the_page_quotes_messages_of_the_code(quoted: str, texts: list[str]) -> None:
    assert any(quoted.strip("… ") in text for text in texts)


@pytest.mark.slow
def test_the_page_of_messages_shows_each_as_it_is(texts: list[str]) -> None:
    assert len(texts) > 300
    assert all(messages.messages().values())
    html = MarkdownIt().render(messages.page())
    assert html.count("<li>") == len(texts) and "<code>" not in html and html.count("<a ") == 1
