"""Measures the cost of capture next to the forward pass, and compares each figure with its bar (see README.md).

    python benchmarks/speed.py [--rounds 5] [NAME ...]

Writes results/speed.json and prints a table. The exit code is 1 if a figure misses its bar.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import (
    EMBEDDED_MODEL,
    RESULTS,
    ROOT,
    cpu_s,
    in_turn,
    job,
    machine,
    medians,
    smollm2_shape,
    wall_s,
    write_texts,
)


@dataclass(frozen=True)
class Line:
    """A line of the table. `taken` holds the measurements of each round, in seconds or in `unit`."""

    name: str
    what: str
    figure: float
    bar: float
    unit: str = "ratio"
    taken: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        met = "ok" if self.figure <= self.bar else "NOT MET"
        return f"{self.name:<22} {self.figure:>8.3f} {self.unit:<6} at most {self.bar:<7g} {met:<8} {self.what}"


def per_example(
    tokens: int, commands: dict[str, Callable[[Path, Path, Path], list[str]]], *, few: int, many: int, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Measures the seconds of an example: of `many` examples minus `few`, so that the start does not count.

    A command gets the model, the texts and a folder to write. Returns the medians by command, and all measurements.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = smollm2_shape(folder / "model")
        measures: dict[str, Callable[[], float]] = {}
        for count in (few, many):
            texts = write_texts(folder / f"{count}.jsonl", count, tokens)
            for who, command in commands.items():
                words = command(model, texts, folder / "out")
                measures[f"{who}, {count}"] = lambda words=words: wall_s(words)
        taken = in_turn(rounds, measures)
    middle = medians(taken)
    return {who: middle[f"{who}, {many}"] - middle[f"{who}, {few}"] for who in commands}, taken


def against_plain_forward(
    name: str, sampler: str, tokens: int, bar: float, *settings: str, few: int, many: int, rounds: int
) -> Line:
    """Compares the wall time of an example in a job with that in a plain forward pass."""

    def plain(model: Path, texts: Path, _: Path) -> list[str]:
        return [sys.executable, "benchmarks/plain_forward.py", str(model), str(texts), str(tokens)]

    def ours(model: Path, texts: Path, out: Path) -> list[str]:
        return job(model, texts, tokens, out, f"sampler={sampler}", "inference.batch_size=1", *settings)

    took, taken = per_example(tokens, {"plain": plain, "job": ours}, few=few, many=many, rounds=rounds)
    what = f"{' '.join((f'sampler={sampler}', *settings))}, {tokens} tokens: an example over a plain forward"
    return Line(name, what, took["job"] / took["plain"], bar, taken=taken)


def attention(rounds: int) -> list[Line]:
    """Compares the wall time of an example in a job with attention summaries with that in a job without them."""
    settings = ["sampler=uniform", "sampler.min_bucket_size=256", "inference.batch_size=1"]

    def job_with(*further: str) -> Callable[[Path, Path, Path], list[str]]:
        return lambda model, texts, out: job(model, texts, 4096, out, *settings, *further)

    commands = {"without": job_with(), "with": job_with("capture.attention.enabled=true")}
    took, taken = per_example(4096, commands, few=1, many=5, rounds=rounds)
    what = "capture.attention, sampler=uniform, 4096 tokens, 16 queries a layer: an example over one without summaries"
    return [Line("attention-4096", what, took["with"] / took["without"], 1.03, taken=taken)]


def uniform(rounds: int) -> list[Line]:
    return [against_plain_forward("uniform-512", "uniform", 512, 1.05, few=8, many=40, rounds=rounds)]


def short(rounds: int) -> list[Line]:
    """Compares the CPU seconds of a short text in a job with those in well-filled batches of a plain process."""
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 1536}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = smollm2_shape(folder / "model", **tiny)
        measures: dict[str, Callable[[], float]] = {}
        for count in (1_000, 41_000):
            texts = write_texts(folder / f"{count}.jsonl", count, 25, shortest=10)
            plain = [sys.executable, "benchmarks/plain_forward.py", str(model), str(texts), "40", "16384"]
            ours = job(model, texts, 40, folder / "out", "sampler=uniform")
            for who, words in (("plain", plain), ("job", ours)):
                measures[f"{who}, {count}"] = lambda words=words: cpu_s(words)
        taken = in_turn(rounds, measures)
    middle = medians(taken)
    took = {who: middle[f"{who}, 41000"] - middle[f"{who}, 1000"] for who in ("plain", "job")}
    what = "sampler=uniform, texts of some 25 tokens, a tiny model: CPU over plain forwards of well-filled batches"
    return [Line("short-25", what, took["job"] / took["plain"], 1.5, taken=taken)]


def everything(rounds: int) -> list[Line]:
    return [against_plain_forward("all-512", "all", 512, 1.40, few=8, many=40, rounds=rounds)]


def everything_long(rounds: int) -> list[Line]:
    return [against_plain_forward("all-4096", "all", 4096, 1.25, few=1, many=33, rounds=min(rounds, 3))]


def of_every_token(rounds: int) -> list[Line]:
    enabled, variances = "capture.statistics.enabled=true", "capture.statistics.covariance=false"
    lines = []
    for tokens, few, many in ((512, 8, 40), (4096, 1, 5)):
        for name, bar, settings in (("covariance", 1.10, [enabled]), ("variance", 1.03, [enabled, variances])):
            sizes = {"few": few, "many": many, "rounds": rounds}
            lines.append(against_plain_forward(f"{name}-{tokens}", "none", tokens, bar, *settings, **sizes))
    return lines


def some_layers(rounds: int) -> list[Line]:
    """Compares the forward time of the first three layers with that of all thirty, as the job reports it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, texts = smollm2_shape(folder / "model"), write_texts(folder / "texts.jsonl", 8, 512)

        def forward_s(layers: str) -> float:
            wall_s(job(model, texts, 512, folder / "out", "inference.batch_size=1", f"capture.layers={layers}"))
            timings = json.loads((folder / "out" / "manifest.json").read_text())["timings"]
            return float(timings["forward"])

        taken = in_turn(rounds, {"all": lambda: forward_s("null"), "three": lambda: forward_s("[0,1,2]")})
    middle = medians(taken)
    what = "capture.layers=[0,1,2] of 30: forward time over that of all"
    return [Line("three-layers", what, middle["three"] / middle["all"], 0.2, taken=taken)]


def parquet(rounds: int) -> list[Line]:
    """Compares CPU seconds from journal to Parquet with those of pyarrow alone, and sizes with raw float32."""
    lines = []
    for dtype, bar in (("float32", 0.87), ("bfloat16", 0.45)):
        figures = [json.loads(_own_process("writing.py", dtype)) for _ in range(rounds)]
        taken = {key: [figure[key] for figure in figures] for key in figures[0]}
        # Each process measures both, at the same speed of the machine.
        ratios = [figure["ours_s"] / figure["bare_s"] for figure in figures]
        unavoidable = statistics.median(figure["overhead_s"] / figure["bare_s"] for figure in figures)
        what = f"{dtype}: CPU of journal to Parquet, over write_table's; {1 + unavoidable:.2f} with checksums alone"
        lines.append(Line(f"parquet-cpu-{dtype}", what, statistics.median(ratios), 1.3, taken=taken))
        size = statistics.median(taken["size"])
        lines.append(Line(f"parquet-size-{dtype}", f"{dtype}: bytes of the files over raw float32", size, bar))
    return lines


def padding(rounds: int) -> list[Line]:
    """Counts the tokens of the documentation in the batches of a job. The count is exact and needs no rounds."""
    del rounds
    from qk_sniffer.config import from_dict
    from qk_sniffer.corpus.batches import batches
    from qk_sniffer.corpus.examples import open_corpus
    from qk_sniffer.corpus.tokenizer import load_tokenizer

    config = from_dict({"model": {"name": str(EMBEDDED_MODEL)}, "dataset": {"path": "pydoc"}})
    tokens = load_tokenizer(config.model)(list(open_corpus(config.dataset).examples()))
    lengths = [example.num_tokens for example in tokens]
    lines = []
    for size in (None, 4, 16, 64):
        cut = batches(lengths, max_batch_tokens=config.inference.max_batch_tokens, batch_size=size)
        computed = sum(max(lengths[index] for index in batch) * len(batch) for batch in cut)
        what = f"tokens computed over valid, batch_size={'null' if size is None else size}, {len(cut)} batches"
        lines.append(Line(f"padding-{size or 'default'}", what, computed / sum(lengths), 1.05))
    return lines


def sliding(rounds: int) -> list[Line]:
    """Compares one sliding layer over n = 65,536 with twice its cost over n = 32,768."""
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for length in (32768, 65536):
            found = json.loads(_own_process("one_sliding_layer.py", str(length)))
            for key, value in found.items():
                taken.setdefault(f"{key}, {length}", []).append(value)
    middle = medians(taken)
    return [
        Line(
            f"sliding-{what}",
            f"one sliding layer (window 512), n = 65,536: {what} over twice that of n = 32,768",
            middle[f"{key}, 65536"] / middle[f"{key}, 32768"] / 2,
            1.1,
            taken={name: values for name, values in taken.items() if name.startswith(key)},
        )
        for key, what in (("forward_s", "time"), ("above_mb", "memory"))
    ]


def start(rounds: int) -> list[Line]:
    """Measures the time from the start of the process to its first batch, without importing torch and transformers."""
    with tempfile.TemporaryDirectory() as temporary:
        settings = [f"output.data_root={temporary}/out", f"hydra.run.dir={temporary}/run", "output.overwrite=true"]
        ours = [sys.executable, "benchmarks/first_batch.py", *settings]
        imports = [
            sys.executable,
            "-c",
            "import torch; from transformers import AutoModel, AutoTokenizer, PreTrainedModel",
        ]
        taken = in_turn(2 * rounds, {"job": lambda: wall_s(ours), "imports": lambda: wall_s(imports)})
    middle = medians(taken)
    what = "process start to first batch, beyond importing torch and transformers"
    return [Line("start", what, middle["job"] - middle["imports"], 1.5, "s", taken)]


def programs(rounds: int) -> list[Line]:
    """Measures programs that need no torch from their start to their end, over the dataset of the demo."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "out"
        words = [sys.executable, "-m", "qk_sniffer"]
        demo = [*words, f"output.data_root={root}", f"hydra.run.dir={temporary}/run"]
        commands = {
            "finished": demo,
            "verify": [*words, "verify", str(root)],
            "status": [*words, "status", temporary],
            "help": [*words, "--help"],
        }
        wall_s(demo)  # makes the dataset
        taken = in_turn(rounds, {name: lambda line=line: wall_s(line) for name, line in commands.items()})
    what = {"finished": "a finished job again", "verify": "verify", "status": "status", "help": "--help"}
    middle = medians(taken)
    return [
        Line(f"program-{name}", f"{which}, the demo's dataset", middle[name], 1.5, "s", {name: taken[name]})
        for name, which in what.items()
    ]


def plan(rounds: int) -> list[Line]:
    """Measures the sample plan of one long text, with the tables that a job makes once."""
    lines = []
    for sampler in ("uniform", "log_uniform", "all"):
        taken = {sampler: [float(_own_process("plan.py", sampler)) for _ in range(rounds)]}
        what = f"plan of 131,072 positions, 36 layers, q and k, sampler={sampler}"
        lines.append(Line(f"plan-{sampler}", what, medians(taken)[sampler], 0.3, "s", taken))
    return lines


def long_context(rounds: int) -> list[Line]:
    """Measures the peak of anonymous memory at 131,072 tokens and 300 heads, above that of a plain forward pass."""
    peaks: dict[str, list[float]] = {}
    for _ in range(min(rounds, 3)):
        for who in ("plain", "uniform", "attention", "all"):
            peaks.setdefault(who, []).append(float(_own_process("long_context.py", who)))
    middle = medians(peaks)
    what = "131,072 tokens, 300 heads: peak memory above a plain forward, sampler="
    return [
        Line("memory-uniform", what + "uniform", middle["uniform"] - middle["plain"], 100, "MB", peaks),
        Line("memory-attention", what + "uniform, with summaries", middle["attention"] - middle["plain"], 164, "MB"),
        Line("memory-all", what + "all", middle["all"] - middle["plain"], 512 + 128 + 200, "MB"),
    ]


def decoding(rounds: int) -> list[Line]:
    """Compares the CPU time of a generated token under a capture with that of one without."""
    figures = [json.loads(_own_process("decoding.py")) for _ in range(rounds)]
    taken = {key: [figure[key] for figure in figures] for key in figures[0]}
    ratio = statistics.median(figure["captured"] / figure["plain"] for figure in figures)
    what = "a token of generate, captured in Python, batch 1: CPU over that of one without"
    return [Line("decoding", what, ratio, 1.5, "ratio", taken)]


def _own_process(script: str, *arguments: str) -> str:
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


BENCHMARKS = {
    "padding": padding,
    "plan": plan,
    "start": start,
    "programs": programs,
    "parquet": parquet,
    "sliding": sliding,
    "three-layers": some_layers,
    "uniform": uniform,
    "short": short,
    "attention": attention,
    "statistics": of_every_token,
    "all": everything,
    "decoding": decoding,
    "memory": long_context,
    "all-long": everything_long,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    found: dict[str, Any] = json.loads(arguments.out.read_text())["lines"] if arguments.out.exists() else {}
    lines: list[Line] = []
    for name in arguments.names or BENCHMARKS:
        for line in BENCHMARKS[name](arguments.rounds):
            print(line, flush=True)
            lines.append(line)
            found[line.name] = asdict(line) | machine()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"lines": found}, indent=2) + "\n")
    return 0 if all(line.figure <= line.bar for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
