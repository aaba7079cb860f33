"""Saves tokenizers with chat templates of the forms that released models have."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from support import bpe


def _lines(template: str) -> str:
    """Returns a template without the breaks of its lines, which it would write."""
    return "".join(template.splitlines())


SPECIAL = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<think>", "</think>"]

CHATML = _lines("""{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""")
"""Writes contents as they are."""

TRIMMED = _lines("""{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
{% else %}{{ raise_exception('Only user and assistant are known') }}{% endif %}
{% endfor %}""")
"""Strips contents, and refuses other roles."""

THINKING = _lines("""{% for message in messages %}{% set content = message.content or '' %}
{% if message.role == 'assistant' %}
{% set thought = message.reasoning_content or '' %}
{% if '</think>' in content %}
{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{{ '<|im_start|>assistant\\n' }}
{% if loop.last and thought %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{ content }}
{% for call in message.tool_calls or [] %}
{% set call = call.function or call %}
{{ '<tool_call>{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}</tool_call>' }}
{% endfor %}
{{ '<|im_end|>\\n' }}
{% else %}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{% endif %}
{% endfor %}""")
"""Writes the thoughts of the last answer alone, between tags, wherever the message has them; and tool calls."""

DATED = """{{ 'Today is ' + strftime_now('%d %B %Y') + '.\\n' }}""" + CHATML


def save_chat_tokenizer(folder: Path, template: str | dict[str, str] | None = CHATML) -> Path:
    """Saves a byte-level tokenizer of English, with `<s>` before and `</s>` after a text, and a chat template."""
    bpe.save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    return folder
