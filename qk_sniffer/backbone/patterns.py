r"""Refuses regular expressions of a checkpoint that would run for ever on the names of its modules.

Adapters and quantized checkpoints name modules by patterns, which their libraries match with `re`. A pattern such as
`(\w+\.?)+X` takes twice as long for each further character. `re` has no limit, so a process with one tries them first.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from qk_sniffer.errors import SourceError

_CPU_S, _WALL_S = 3, 120
"""The time for all patterns of a checkpoint, which take milliseconds, and the longest wait on a busy machine."""

_PROGRAM = r"""
import json, re, resource, signal, sys
patterns, names, cpu_s = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, cpu_s)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for pattern in patterns:
    print(json.dumps(pattern), flush=True)
    for before, after in (("", ""), (r"(.*\.)?(", ")$"), (r"(?:^|.*?\.)", r"\.(\d+)\."), (r"(^|.*\.)", r"($|\..*)")):
        try:
            compiled = re.compile(before + pattern + after)
        except re.error:
            continue
        for name in names:
            compiled.match(name)
            compiled.fullmatch(name)
"""
"""Matches patterns in the ways of peft and of the quantizers; prints each one first."""

_HARMLESS = re.compile(r"[^*+?{(]*([*+?{][^*+?{(]*){1,2}")
"""A pattern without groups, with one or two quantifiers: at worst, it takes the cube of a name's length."""

_USUAL_NAME = "model.layers.00.self_attn.q_proj"


def refuse_runaway_patterns(where: str, settings: Any, names: Iterable[str]) -> None:
    """Checks that matching the texts in `settings` with the `names` of modules ends in a moment.

    Args:
        where: the name of the settings in errors.
        settings: plain data. Each text in it, a key included, counts as a pattern.
        names: of modules.

    Raises:
        SourceError: a pattern does not end.
    """
    patterns = sorted({text.removeprefix("re:") for text in _texts(settings) if re.search(r"[*+?{]", text)})
    patterns = [pattern for pattern in patterns if not _HARMLESS.fullmatch(pattern)]
    if not patterns:
        return
    # Names that differ in digits take as long.
    alike = sorted({_USUAL_NAME, *(re.sub(r"\d", "0", name) for name in names)})
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        data = json.dumps([patterns, alike, _CPU_S])
        done = subprocess.run(command, input=data, capture_output=True, text=True, timeout=_WALL_S)
        tried, has_ended = done.stdout, done.returncode != -signal.SIGPROF
    except subprocess.TimeoutExpired as error:
        tried, has_ended = (error.stdout or b"").decode(), False
    if not has_ended:
        pattern = json.loads(tried.splitlines()[-1]) if tried else ""
        raise SourceError(
            f"{where} has a pattern whose comparison with the names of modules does not end: {pattern[:200]!r}. Write "
            "the names themselves, or use a copy from another source"
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _texts(inner)
