"""Compares qk-sniffer with other ways to get all Q and K vectors of the same texts, or moments of Q (see README.md).

    python benchmarks/peers.py [--rounds 3] [--few 2] [--many 14] [--tokens 512]

`make bench-peers` makes the environments of the peers first. Writes results/peers.json and prints a table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from common import RESULTS, ROOT, job, machine, smollm2_shape, write_texts
from memory import PERIOD_S, SETTINGS, anonymous_mb
from safetensors.numpy import load_file

PEERS = ("transformer_lens", "nnsight", "kvpress")
Command = Callable[[Path, Path], list[str]]
"""Returns the command of a process that captures these texts and writes this folder."""


@dataclass(frozen=True)
class Product:
    """What a way gives: its name in the table, and the settings of a job that gives the same."""

    name: str
    settings: tuple[str, ...]


BEFORE = Product("before RoPE", ("sampler=all", "capture.capture_pre_rope=true"))
AFTER = Product("after RoPE", ("sampler=all",))
MOMENTS = Product(
    "moments before RoPE",
    (
        *("sampler=none", "capture.capture_keys=false", "capture.statistics.enabled=true"),
        *("capture.statistics.stages=[pre]", "capture.statistics.skip_tokens=4"),
    ),
)
"""Mean and covariance of the queries of each head. The first four tokens of a text are left out, as kvpress does."""


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mb: float


@dataclass
class Side:
    """A line of the table. `product` is None if it gives nothing."""

    name: str
    command: Command
    product: Product | None = None
    runs: dict[int, list[Run]] = field(default_factory=dict)
    size: float | None = None
    difference: float | None = None

    def median(self, what: str, examples: int) -> float:
        return float(statistics.median(getattr(run, what) for run in self.runs[examples]))

    def more(self, what: str) -> float:
        """Returns the cost of one more example, without the start of the process and its constant memory.

        It is the median over the rounds. The two runs of a round follow each other, in the same minute.
        """
        few, many = sorted(self.runs)
        pairs = zip(self.runs[few], self.runs[many], strict=True)
        return statistics.median(getattr(more, what) - getattr(less, what) for less, more in pairs) / (many - few)


def sides(model: Path, tokens: int) -> list[Side]:
    def script(name: str, *options: str, interpreter: str = sys.executable) -> Command:
        return lambda texts, root: [
            *(interpreter, f"benchmarks/{name}.py", str(model), str(texts), str(tokens), str(root), *options)
        ]

    def ours(product: Product, *settings: str) -> Command:
        return lambda texts, root: ours_of(product, model, texts, tokens, root, *settings)

    lens, sight, press = (str(environment(peer) / "bin" / "python") for peer in PEERS)
    return [
        Side("plain forward", lambda texts, root: script("plain_forward")(texts, root)[:-1]),
        Side("qk-sniffer", ours(AFTER), AFTER),
        Side("qk-sniffer, small buffers", ours(AFTER, *SETTINGS), AFTER),
        Side("hooks by hand", script("peers/with_hooks"), BEFORE),
        Side("TransformerLens", script("peers/with_transformer_lens", interpreter=lens), AFTER),
        Side("nnsight", script("peers/with_nnsight", interpreter=sight), AFTER),
        Side("nnsight, projections", script("peers/with_nnsight", "projections", interpreter=sight), BEFORE),
        Side("qk-sniffer, statistics", ours(MOMENTS), MOMENTS),
        Side("kvpress", script("peers/with_kvpress", interpreter=press), MOMENTS),
    ]


def ours_of(product: Product, model: Path, texts: Path, tokens: int, root: Path, *settings: str) -> list[str]:
    """Returns the command of a job that gives a product."""
    return job(model, texts, tokens, root, "inference.batch_size=1", *product.settings, *settings)


def environment(peer: str) -> Path:
    return ROOT / ".venv-peers" / peer


def measured(command: list[str]) -> Run:
    """Returns the seconds and the peak of anonymous memory of a process."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        start, peak_mb = time.perf_counter(), 0.0
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=offline)
        while process.poll() is None:
            peak_mb = max(peak_mb, anonymous_mb(process.pid) or 0.0)
            time.sleep(PERIOD_S)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{output.read()}")
    return Run(round(seconds, 3), peak_mb)


def head_files(root: Path) -> dict[str, Path]:
    """Returns the files of the heads that have rows, by the names of their folders."""
    files = root.glob("l*h*/data.parquet")
    return {file.parent.name: file for file in files if pq.read_metadata(file).num_rows}


def size_over_raw(root: Path) -> float | None:
    """Returns the bytes of the heads' files over the bytes of their vectors as float32; None without such files."""
    files = head_files(root).values()
    raw = sum(_vectors(file).nbytes for file in files)
    return sum(file.stat().st_size for file in files) / raw if raw else None


def difference(root: Path, reference: Path) -> float:
    """Returns the largest relative error, norm of the difference over norm, of any row; 0 if all bits are equal.

    A row is a vector, a mean, or all numbers of a covariance.
    """
    expected, found = arrays(reference), arrays(root)
    if not expected or expected.keys() != found.keys():
        raise SystemExit(f"{root} has {len(found)} arrays, {reference} has {len(expected)}")
    worst = 0.0
    for name, theirs in found.items():
        ours = expected[name]
        if theirs.tobytes() != ours.tobytes():
            off = np.linalg.norm(theirs - ours, axis=1) / np.linalg.norm(ours, axis=1)
            worst = max(worst, float(off.max()))
    return worst


def arrays(root: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the arrays (rows, numbers) of a folder by head and name: vectors, our statistics or those of kvpress."""
    found = {f"{head} vectors": _vectors(file) for head, file in head_files(root).items()}
    for file in root.glob("statistics/layer-*.safetensors"):
        layer, tensors = int(file.stem.removeprefix("layer-")), load_file(file)
        for name in ("mean", "covariance"):
            for head, numbers in zip(tensors["q.pre.heads"], tensors[f"q.pre.{name}"], strict=True):
                found[f"l{layer:02}h{head:02}q {name}"] = numbers.reshape(1, -1)
    for file in root.glob("model.safetensors"):
        tensors = load_file(file)
        for name, key in (("mean", "query_mean"), ("covariance", "query_cov")):
            for layer, head in np.ndindex(tensors[key].shape[:2]):
                found[f"l{layer:02}h{head:02}q {name}"] = tensors[key][layer, head].reshape(1, -1)
    return found


def _vectors(file: Path) -> npt.NDArray[np.float32]:
    """Returns (rows, head_dim), ordered by example and position."""
    table = pq.read_table(file, columns=["example_id", "position", "vector"])
    vector = table.sort_by([("example_id", "ascending"), ("position", "ascending")])["vector"].combine_chunks()
    numbers: npt.NDArray[np.float32] = vector.flatten().to_numpy()
    return numbers.reshape(len(table), -1)


def write_cut_texts(path: Path, examples: int, tokens: int, model: Path) -> Path:
    """Writes texts as `write_texts` does, and cuts them to `tokens` tokens: kvpress cuts at characters alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = write_texts(path, examples, tokens).read_text(encoding="utf-8").splitlines()
    cut = [first_tokens(tokenizer, json.loads(line)["text"], tokens) for line in lines]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in cut), encoding="utf-8")
    return path


def first_tokens(tokenizer: Any, text: str, tokens: int) -> str:
    """Returns the longest beginning of a text, of at most `tokens` tokens, that has the same tokens on its own.

    A cut can change the last token, such as one of several spaces: then the beginning has a token less.
    """
    whole = tokenizer(text, truncation=True, max_length=tokens, return_offsets_mapping=True)
    for count in range(len(whole.input_ids), 0, -1):
        beginning = text[: whole.offset_mapping[count - 1][1]]
        if tokenizer(beginning).input_ids == whole.input_ids[:count]:
            return beginning
    raise SystemExit("the tokenizer gives no beginning of a text the tokens that it has in the text")


def compare(lines: list[Side], model: Path, folder: Path, tokens: int) -> None:
    """Compares the product of one text with that of qk-sniffer, and warms up all environments."""
    texts = write_cut_texts(folder / "one.jsonl", 1, tokens, model)
    reference = {product: folder / f"reference-{number}" for number, product in enumerate((BEFORE, AFTER, MOMENTS))}
    for product, root in reference.items():
        measured(ours_of(product, model, texts, tokens, root))
    for side in lines:
        root = folder / "one"
        measured(side.command(texts, root))
        if side.product is not None:
            side.difference = difference(root, reference[side.product])
            shutil.rmtree(root)


def table(lines: list[Side]) -> str:
    """Returns the Markdown table. Times are relative to the first line."""
    many = max(lines[0].runs)
    rows = [["", "time", "peak MB", "MB more an example", "size over raw", "gives", "differ from ours by"]]
    for side in lines:
        rows.append(
            [
                side.name,
                f"{side.more('seconds') / lines[0].more('seconds'):.2f}",
                f"{side.median('peak_mb', many):,.0f}",
                f"{side.more('peak_mb'):.1f}",
                "" if side.size is None else f"{side.size:.3f}",
                "" if side.product is None else side.product.name,
                "" if side.difference is None else f"{side.difference:.1e}" if side.difference else "nothing",
            ]
        )
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def versions_of(peer: str) -> dict[str, str]:
    names = (peer, "torch", "transformers", "pyarrow")
    code = f"from importlib.metadata import version; import json; print(json.dumps([version(n) for n in {names}]))"
    command = [str(environment(peer) / "bin" / "python"), "-c", code]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return dict(zip(names, found, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--few", type=int, default=2)
    parser.add_argument("--many", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    given = parser.parse_args()
    if missing := [peer for peer in PEERS if not environment(peer).exists()]:
        parser.error(f"{', '.join(missing)}: no environment; `make bench-peers` makes it")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = smollm2_shape(folder / "model")
        lines = sides(model, given.tokens)
        compare(lines, model, folder, given.tokens)
        numbers = (given.few, given.many)
        texts = {n: write_cut_texts(folder / f"{n}.jsonl", n, given.tokens, model) for n in numbers}
        for number in range(given.rounds):
            for side in lines:
                for examples, file in texts.items():
                    root = folder / "out"
                    run = measured(side.command(file, root))
                    side.runs.setdefault(examples, []).append(run)
                    print(f"round {number + 1}: {side.name}, {examples}: {run}", flush=True)
                    if side.product is not None:
                        side.size = size_over_raw(root)
                        shutil.rmtree(root)
    print(table(lines))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "what": "all Q and K vectors, or moments of Q: SmolLM2-135M's shape, random weights, float32, one text a batch",
        "tokens_per_example": given.tokens,
        "columns": {
            "time_over_plain": "wall time an example, (many - few) of each round, median, over a plain forward's",
            "peak_mb": "median of the peak RssAnon at the larger number of examples",
            "mb_per_example": "growth of that peak with each example, between the two numbers of examples",
            "size_over_raw": "bytes of the heads' Parquet files over the bytes of their vectors as float32",
            "difference": "one text: worst distance of a vector or moment from ours, over its norm; 0: bit-equal",
        },
        "lines": {
            side.name: {
                "gives": side.product and side.product.name,
                "time_over_plain": round(side.more("seconds") / lines[0].more("seconds"), 3),
                "peak_mb": side.median("peak_mb", given.many),
                "mb_per_example": round(side.more("peak_mb"), 2),
                "size_over_raw": side.size,
                "difference": side.difference,
                "runs": {examples: [asdict(run) for run in runs] for examples, runs in side.runs.items()},
            }
            for side in lines
        },
        "peers": {peer: versions_of(peer) for peer in PEERS},
    }
    given.out.write_text(json.dumps(result | machine(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
