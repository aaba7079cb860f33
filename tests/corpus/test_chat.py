"""Tests conversations: their tokens are those of transformers' own function, and refusals name the row."""

from pathlib import Path
from typing import Any

import pytest
from support.chats import CHATML, DATED, THINKING, TRIMMED, save_chat_tokenizer
from transformers import AutoTokenizer

from qk_sniffer.config import ChatConfig, ModelConfig, TokenizerConfig
from qk_sniffer.corpus.contents import Conversation, text_hash
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

TURNS = [
    {"role": "user", "content": "  What is the statement for?\n"},
    {"role": "assistant", "content": "It is <|im_end|> a statement.\n\n"},
    {"role": "user", "content": "\nnaïve 漢字 \U0001f600"},
]
ANSWER = {"role": "assistant", "content": "<think>\nThe user asks.\n</think>\n\nYes."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é", "n": 2}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def example(messages: list[dict[str, Any]], index: int = 0) -> Example:
    return Example(index, index, f"id {index}", Conversation(messages))


def loaded(folder: Path, max_length: int = 4096, **chat: Any) -> TextTokenizer:
    model = ModelConfig(name=str(folder), tokenizer=TokenizerConfig(max_length=max_length))
    return load_tokenizer(model, chat=ChatConfig(**chat))


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", [CHATML, TRIMMED, THINKING], ids=["chatml", "trimmed", "thinking"])
def test_the_tokens_are_those_of_apply_chat_template(tmp_path: Path, template: str, prompt: bool) -> None:
    save_chat_tokenizer(tmp_path, template)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    conversations: list[Any] = [TURNS, TURNS[:1], [*TURNS, ANSWER]]
    if template == THINKING:
        conversations += [[*TURNS, CALL, {"role": "tool", "content": "42"}], [ANSWER, TURNS[0], ANSWER]]
    tokenizer = loaded(tmp_path, add_generation_prompt=prompt)
    examples = [example(messages, index) for index, messages in enumerate(conversations)]
    for messages, one, tokens in zip(conversations, examples, tokenizer(examples), strict=True):
        text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        expected = reference.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert tokens.ids.tolist() == expected and tokens.left_out == 0
        assert tokens.text_hash == text_hash(text) == tokenizer.content_hash(one)
        assert not tokens.begins_special and not tokens.ends_special and tokens.segments is None
        [cut] = loaded(tmp_path, 7, add_generation_prompt=prompt)([one])
        assert cut.ids.tolist() == expected[:7] and cut.left_out == len(expected) - 7


def test_the_template_writes_the_only_special_tokens(tmp_path: Path) -> None:
    tokenizer = loaded(save_chat_tokenizer(tmp_path, TRIMMED))
    [tokens] = tokenizer([example(TURNS[:1])])
    strings = tokenizer.token_strings(tokens.ids)
    assert strings.count("<s>") == 1 and strings[0] == "<s>" and "</s>" not in strings
    assert tokenizer.facts()["chat_template"] and "special_tokens" not in tokenizer.facts()


def test_the_template_may_be_given_or_chosen(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path, {"default": CHATML, "trimmed": TRIMMED, "tool_use": "{{ tools }}"})
    reference = AutoTokenizer.from_pretrained(folder)
    for chat, template in (({}, CHATML), ({"template": "trimmed"}, TRIMMED), ({"template": THINKING}, THINKING)):
        tokenizer = loaded(folder, **chat)
        [tokens] = tokenizer([example(TURNS)])
        assert tokens.ids.tolist() == reference.apply_chat_template(TURNS, chat_template=template)["input_ids"]
    [tools] = loaded(folder, kwargs={"tools": TOOLS})([example(TURNS)])
    assert tools.ids.tolist() == reference.apply_chat_template(TURNS, tools=TOOLS)["input_ids"]
    digests = {loaded(folder, **chat).facts()["chat_template"] for chat in ({}, {"template": "trimmed"})}
    assert len(digests) == 2


def test_variables_of_the_template(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path, "{{ greeting }} {{ messages[0].content }}")
    [tokens] = loaded(folder, kwargs={"greeting": "Well,"})([example(TURNS)])
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, greeting="Well,")["input_ids"]
    assert tokens.ids.tolist() == expected


def test_a_date_is_given_and_not_that_of_the_day(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path, DATED)
    with pytest.raises(
        SourceError, match=r"the chat template of .* writes today's date, .*dataset\.chat\.date=2025-01-31"
    ):
        loaded(folder)
    sometimes = "{{ strftime_now('%d') if messages | length > 2 }}" + CHATML
    with pytest.raises(SourceError, match=r"example 4 of the dataset \(id id 4\) .*dataset\.chat\.date=2025-01-31"):
        loaded(folder, template=sometimes)([example(TURNS, 4)])
    dated = loaded(folder, date="2024-07-26")
    assert dated.content_hash(example(TURNS)) == text_hash(
        "Today is 26 July 2024.\n" + AutoTokenizer.from_pretrained(folder).apply_chat_template(
            TURNS, chat_template=CHATML, tokenize=False
        )
    )  # fmt: skip
    assert dated.facts() == loaded(folder, date="2025-01-31").facts(), "the date is another setting than the template"


def test_refusals_name_the_row_and_the_way_out(tmp_path: Path) -> None:
    def refusal(folder: Path, messages: Any, **chat: Any) -> str:
        with pytest.raises(SourceError) as caught:
            loaded(folder, **chat)([example(TURNS, 2), example(messages, 3)])
        return str(caught.value)

    trimmed = save_chat_tokenizer(tmp_path / "trimmed", TRIMMED)
    text = refusal(trimmed, [{"role": "system", "content": "a"}, TURNS[0]])
    assert text.startswith(f"example 3 of the dataset (id id 3) is refused by the chat template of {trimmed}: ")
    assert text.endswith("Only user and assistant are known. The roles of its messages are system, user")
    assert "half a surrogate pair" in refusal(trimmed, [{"role": "user", "content": "\ud800"}])
    none = save_chat_tokenizer(tmp_path / "none", None)
    assert "has no chat template" in refusal(none, TURNS) and "dataset.chat.template" in refusal(none, TURNS)
    assert "no chat template of this name. It has none at all" in refusal(none, TURNS, template="tool_use")
    several = save_chat_tokenizer(tmp_path / "several", {"one": CHATML, "two": TRIMMED})
    assert "none is the default. Its templates are one, two: set dataset.chat.template" in refusal(several, TURNS)
    broken = refusal(save_chat_tokenizer(tmp_path / "broken", "{% if %}"), TURNS)
    assert "example 2 of the dataset" in broken and "is refused by the chat template of" in broken


@pytest.mark.parametrize("random", ["{{ range(99999)|random }}", "{{ lipsum(1, false) }}"])
def test_a_random_template_is_refused(tmp_path: Path, random: str) -> None:
    save_chat_tokenizer(tmp_path, "{{ messages[0]['content'] }}" + random)
    with pytest.raises(SourceError, match=r"example 0 .* is rendered differently each time by the chat template of"):
        loaded(tmp_path)([example(TURNS)])


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(
        tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
    )
    try:
        [tokens] = loaded(folder)([example(TURNS)])
    except SourceError as error:
        assert "unsafe" in str(error) or "__class__" in str(error)
    else:
        assert "class" not in "".join(loaded(folder).token_strings(tokens.ids))
