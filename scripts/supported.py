"""Which causal language models of the installed transformers can be captured: writes models/SUPPORTED.md.

    python scripts/supported.py [--jobs N] [--out FILE] [MODEL_TYPE ...]

Each is examined (`examine.py`) in a process of its own kind, which is killed when one takes too long: one that hangs,
crashes or is captured wrongly stands in the table as FAILED or WRONG, and the command fails. Types that are named are
printed and not written.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import transformers
from examine import Entry, examine
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TABLE = Path(__file__).parent.parent / "models" / "SUPPORTED.md"
TIMEOUT_S = 120
"""For one type, and once for the imports."""

HEADER = """\
# Supported models

Written by `python scripts/supported.py` with transformers {version}; `tests/backbone/test_supported.py` compares it
with the code. Every causal language model of transformers was built tiny and random from its config, saved, loaded and
captured as a job does it:

- **post-RoPE**: yes where query and key are bit for bit what an independent recorder of the attention kernel receives,
  layers, heads, windows, softmax scale, softcap and sinks explain the attention weights, but for a bias and for sparse
  attention, which are named; the forward is unchanged, and no token sees a later one. All others are refused with an
  error that says why.
- **pre-RoPE**: yes where they are bit for bit what the model's rotary functions are given, beside the part of each head
  that is not rotated. `no RoPE`: no layer is rotated, so that there is nothing to be before.
- **proof**: yes where a job proves its dataset by hooks; `pre`: only one of vectors before RoPE.

A type of several modalities stands for its text decoder. `bert` and its kin are captured as decoders
(`is_decoder: true`), and refused as encoders. Sliding windows are switched on where a config has them.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return _work(arguments.types)
    types = arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(
            lambda part: list(_examined(part)), (types[i :: arguments.jobs] for i in range(arguments.jobs))
        )
        entries = sorted((entry for part in parts for entry in part), key=lambda entry: entry.model_type)
    if arguments.types:
        print("\n".join(map(row, entries)))
    else:
        arguments.out.write_text(table(entries))
    bad = [entry for entry in entries if entry.post not in ("yes", "no")]
    for entry in bad:
        print(f"{entry.model_type}: {entry.post}: {entry.note}", file=sys.stderr)
    return 1 if bad else 0


def table(entries: Sequence[Entry]) -> str:
    """The page; the same for the same entries."""
    captured = [entry for entry in entries if entry.post != "no"]
    refused = [entry for entry in entries if entry.post == "no"]
    pre = Counter(entry.pre for entry in captured)
    proof = Counter(entry.proof for entry in captured)
    reasons = Counter(re.sub(r" \([^)]*\)", "", entry.note) for entry in refused)
    lines = [
        f"Of {len(entries)} model types, **{len(captured)} are captured** and {len(refused)} refused. Of the captured "
        f"ones, {pre['yes']} are captured before RoPE too, {pre['no RoPE']} have no RoPE, and {pre['no']} are refused "
        f"before RoPE. Jobs prove the datasets of {proof['yes']}, and of {proof['pre']} more those before RoPE.",
        "",
        "| model type | class | post-RoPE | pre-RoPE | proof | layout |",
        "|---|---|---|---|---|---|",
        *map(row, captured),
        "",
        "## Refused",
        "",
        *(f"- {count}: {reason}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "",
        "| model type | class | reason |",
        "|---|---|---|",
        *map(row, refused),
        "",
    ]
    return HEADER.format(version=transformers.__version__) + "\n".join(lines)


def row(entry: Entry) -> str:
    """The type's line on the page: among the refused ones it has only its reason."""
    cells = list(asdict(entry).values())
    return "| " + " | ".join(cells[:2] + cells[-1:] if entry.post == "no" else cells) + " |"


def _examined(types: Sequence[str]) -> Iterator[Entry]:
    left = list(types)
    while left:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *left],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert process.stdout is not None
        while True:
            watchdog = threading.Timer(TIMEOUT_S, process.kill)
            watchdog.start()
            line = process.stdout.readline()
            watchdog.cancel()
            if not line:
                break
            left.pop(0)
            yield Entry(**json.loads(line))
        if process.wait() != 0 or left:
            died = left.pop(0)
            note = f"its process ended with code {process.returncode}, or took more than {TIMEOUT_S} s"
            yield Entry(died, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[died], post="FAILED", note=note)


def _work(types: Sequence[str]) -> int:
    """Examines one type after another; prints a line of JSON for each."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    for model_type in types:
        try:
            entry = examine(model_type)
        except Exception as error:
            class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            entry = Entry(model_type, class_name, post="FAILED", note=note)
        print(json.dumps(asdict(entry)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
