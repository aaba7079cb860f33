"""Captures every language model of the installed transformers, multimodal ones too, and writes two files.

    python scripts/supported.py [--jobs N] [MODEL_TYPE ...]

`models/SUPPORTED.md` is the table for readers. `qk_sniffer/backbone/provable_types.py` lists the model types whose
datasets a job proves. With MODEL_TYPE, the command prints the rows of these types and writes nothing; `whole:gemma3` is
the row of the multimodal model in the table of those.

Worker processes examine the types (`examine.py`, `examine_whole.py`). A worker that takes too long is killed. A type
that hangs, crashes or is captured wrongly has a row FAILED or WRONG, and the command exits with code 1.
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
from dataclasses import asdict, replace
from pathlib import Path

import quantized
import transformers
from examine import Entry, examine
from examine_proof import names_projections, names_values
from examine_whole import examine_whole, whole_types
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qk_sniffer.backbone.family import find_family

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "models" / "SUPPORTED.md"
PROVABLE = ROOT / "qk_sniffer" / "backbone" / "provable_types.py"
WHOLE = "whole:"
"""Before the type of a multimodal model that is compared with its decoder."""
TIMEOUT_S = 120
"""For one type, or for the imports of a worker."""

HEADER = """\
# Supported models

Written by `python scripts/supported.py` with transformers {version}; `tests/backbone/test_supported.py` compares it
with the code. Every causal language model of transformers was built tiny and random from its config, saved, loaded and
captured as a job does it:

- **post-RoPE**: yes if query and key equal, bit for bit, the kernel's arguments in an independent recording.
  Layers, heads, windows, softmax scale, softcap and sinks explain the attention weights; the last column names a bias
  and sparse attention. The forward pass is unchanged, and no token sees a later one. All other types are refused with
  an error that gives the reason.
- **pre-RoPE**: yes if query and key equal, bit for bit, the inputs of the model's rotary functions, next to the part of
  each head that is not rotated. `no RoPE`: no layer is rotated.
- **proof**: yes if a job proves its dataset by hooks. `pre`: only a dataset of vectors before RoPE.
- **attention**: yes if the attention summaries (`capture.attention`) of every query are those of the attention weights
  of the model's eager kernel: from the arguments of that kernel, and from those of the default one.
- **v and o**: captured if values and outputs equal, bit for bit, the kernel's argument and result in the recording, or
  `proven` if a job also proves them. `values proven`: the outputs are not derived a second time. `no`: refused.

A multimodal type is captured by its text decoder; [below](#multimodal-models) it is compared with the whole model.
`bert` and similar types are captured as decoders (`is_decoder: true`) and refused as encoders. Sliding windows,
multipliers, caps, biases, norms and YaRN are enabled wherever a config has them.

"""

WHOLE_HEADER = """\
## Multimodal models

The whole model was built tiny and random with its towers, and saved twice: as its checkpoints are published, and with
the names of its own modules. Captured: the decoder is loaded from both without the towers, and its query and key are
those of the whole model in a forward pass over a text.

"""

PROVABLE_HEADER = '''\
"""Lists the model types whose query and key follow from submodules with the names that `Family.projections` knows.

Written by `python scripts/supported.py`, which derives the vectors of every type from these submodules and compares
them with the captured ones. Other types are not proven, because another operation may come between the two. Values and
outputs of `PROVABLE_VALUE_TYPES` follow too.
"""

'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return _work(arguments.types)
    whole = [f"{WHOLE}{model_type}" for model_type in whole_types()]
    types = arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + whole
    with ThreadPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(
            lambda part: list(_examined(part)), (types[i :: arguments.jobs] for i in range(arguments.jobs))
        )
        entries = sorted((entry for part in parts for entry in part), key=lambda entry: (entry.whole, entry.model_type))
    if arguments.types:
        print("\n".join(map(row, entries)))
    else:
        TABLE.write_text(f"{table(entries)}\n{quantized.table()}")
        PROVABLE.write_text(provable_module(entries))
    bad = [entry for entry in entries if entry.post not in ("yes", "no")]
    for entry in bad:
        print(f"{entry.model_type}: {entry.post}: {entry.note}", file=sys.stderr)
    return 1 if bad else 0


def table(entries: Sequence[Entry]) -> str:
    """Returns the page of the table; a pure function of the entries."""
    whole = [entry for entry in entries if entry.whole]
    entries = [entry for entry in entries if not entry.whole]
    captured = [entry for entry in entries if entry.post != "no"]
    refused = [entry for entry in entries if entry.post == "no"]
    pre = Counter(entry.pre for entry in captured)
    proof = Counter(entry.proof for entry in captured)
    values = Counter(entry.values for entry in captured)
    reasons = Counter(re.sub(r" \([^)]*\)", "", entry.note) for entry in refused)
    lines = [
        f"Of {len(entries)} model types, **{len(captured)} are captured** and {len(refused)} refused. Of the captured "
        f"ones, {pre['yes']} are captured before RoPE too, {pre['no RoPE']} have no RoPE, and {pre['no']} are refused "
        f"before RoPE. Jobs prove the datasets of {proof['yes']}, and of {proof['pre']} more those before RoPE. "
        f"The attention of {sum(entry.attention == 'yes' for entry in captured)} can be summarized. "
        f"Values and outputs are captured of {len(captured) - values['no']}, and proven of {values['proven']}.",
        "",
        "| model type | class | post-RoPE | pre-RoPE | proof | attention | v and o | layout |",
        "|---|---|---|---|---|---|---|---|",
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
    return HEADER.format(version=transformers.__version__) + "\n".join(lines) + "\n" + _whole_table(whole)


def _whole_table(entries: Sequence[Entry]) -> str:
    captured = sum(entry.post == "yes" for entry in entries)
    lines = [
        f"Of {len(entries)} model types, **{captured} are captured** and {len(entries) - captured} refused.",
        "",
        "| model type | class | captured | decoder | note |",
        "|---|---|---|---|---|",
        *map(row, entries),
        "",
    ]
    return WHOLE_HEADER + "\n".join(lines)


def row(entry: Entry) -> str:
    """Returns the type's line of the page: a refused type has only its reason, except in the table of whole models."""
    if entry.whole:
        cells = [entry.model_type, f"`{entry.class_name}`", entry.post, entry.decoder_type, entry.note]
        return "| " + " | ".join(cells) + " |"
    verdicts = [entry.post, entry.pre, entry.proof, entry.attention, entry.values] if entry.post != "no" else []
    return "| " + " | ".join([entry.model_type, entry.class_name, *verdicts, entry.note]) + " |"


def provable_module(entries: Sequence[Entry]) -> str:
    """Returns the code of `provable_types.py`: the proven decoder types whose families do not name the projections."""
    proven = {entry.decoder_type for entry in entries if entry.proof != "no"}
    types = sorted(name for name in proven if not names_projections(find_family(name)))
    with_values = {entry.decoder_type for entry in entries if "proven" in entry.values}
    value_types = sorted(name for name in with_values if not names_values(find_family(name)))
    return (
        PROVABLE_HEADER + _frozenset("PROVABLE_TYPES", types) + "\n" + _frozenset("PROVABLE_VALUE_TYPES", value_types)
    )


def _frozenset(name: str, types: Sequence[str]) -> str:
    return f"{name} = frozenset(\n    {{\n" + "".join(f'        "{one}",\n' for one in types) + "    }\n)\n"


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
            yield replace(_entry(died), post="FAILED", note=note)


def _entry(model_type: str) -> Entry:
    """Returns the entry of a type before its examination."""
    name = model_type.removeprefix(WHOLE)
    if name != model_type:
        return Entry(name, "", whole=True)
    return Entry(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])


def _work(types: Sequence[str]) -> int:
    """Examines one type after another and prints a line of JSON for each."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    for model_type in types:
        name = model_type.removeprefix(WHOLE)
        try:
            entry = examine(name) if name == model_type else examine_whole(name)
        except Exception as error:
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            entry = replace(_entry(model_type), post="FAILED", note=note)
        print(json.dumps(asdict(entry)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
