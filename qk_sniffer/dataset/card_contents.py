"""Describes on the card what the examples are: texts, conversations or token ids, and their special tokens."""

from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.markdown import code, plain


def contents(facts: CardFacts) -> list[tuple[str, str]]:
    """Returns the settings of the columns that hold the contents of the examples, some of them empty."""
    dataset = facts.config.dataset
    if dataset.messages_column is not None:
        chat = dataset.chat
        return [
            ("messages column", plain(dataset.messages_column)),
            ("chat template", "" if facts.chat_template is None else f"sha256 {facts.chat_template[:16]}"),
            ("prompt for an answer", "added" if chat.add_generation_prompt else ""),
            ("date in the template", plain(chat.date or "")),
            ("variables of the template", plain(", ".join(chat.kwargs))),
        ]
    if dataset.tokens_column is not None:
        return [
            ("token ids column", plain(dataset.tokens_column)),
            ("segments column", plain(dataset.segments_column or "")),
        ]
    return [("text column", plain(dataset.text_column))]


def special_tokens(facts: CardFacts) -> str:
    """Returns which special tokens the examples have."""
    if facts.config.dataset.messages_column is not None:
        return "those of the chat template"
    if facts.config.dataset.tokens_column is not None:
        return "those of the token ids"
    if (added := facts.config.model.tokenizer.add_special_tokens) != "auto":
        return "added" if added else "not added"
    sides = [
        f"{code(''.join(facts.special_tokens[side]))} {side} each text"
        + (f" ({number:,} have it already)" if (number := facts.own_special_tokens.get(side)) else "")
        for side in ("before", "after")
        if facts.special_tokens.get(side)
    ]
    return " and ".join(sides) or "none: the tokenizer adds none"
