"""Draws the plasticity of several datasets in one figure: of checkpoints of a training run, or of different models.

runs are folders that python -m qk_sniffer.plasticity has written, separated by commas. If the revision or the name of
every model has a step (stage1-step-40000, step1000), the figure shows the runs in the order of training, at their steps
if these grow. Otherwise it keeps the given order. It prints the difference of each run to the first one in the figure.

Exit codes: 0 the figure is written, 1 it cannot be written, 2 the settings are wrong, 130 interrupted.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qk_sniffer.cli import program
from qk_sniffer.drawing.style import BLACK, BLUE, GREY, PAGE_IN, PAPER_SUFFIXES, Float64, as_text, figure, save
from qk_sniffer.errors import ConfigError, QkSnifferError
from qk_sniffer.plasticity.config import INSTALL
from qk_sniffer.plasticity.figures import PLASTICITY, at_revision, by_head_and_bucket, corrected, model_name
from qk_sniffer.plasticity.intervals import of_all
from qk_sniffer.plasticity.results import Results
from qk_sniffer.store.disk import explained, make_folder
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.text import counted, expand_home, path_problem, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>"

MOST_LINEAR = 30
"""The largest ratio of the last training step to the first on an axis that is not logarithmic."""

_NAME_LENGTH = 300
"""The part of a name in which a training step is looked for."""


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    runs: str = field(metadata={"help": "folders of results, separated by commas"})
    output: Path = field(
        default=Path("plasticity.png"),
        metadata={"help": "file of the figure, a .png; its .svg and .pdf are written next to it"},
    )


@dataclass(frozen=True, eq=False)
class Run:
    """The results of a dataset. `heads` are the plasticities of its heads, and `mean` the estimate of their mean: its
    value and the ends of its interval, NaN without replicates. `null` is the mean without drift. `by_bucket` is the
    mean plasticity over heads, from the first query bucket with a value to the last. All are corrected for the size of
    the sample, if there are replicates."""

    folder: str
    model: str
    texts: str
    revision: str
    estimator: str
    heads: Float64
    by_bucket: Float64
    mean: tuple[float, float, float]
    null: float = float("nan")


class Axis(Enum):
    """What the runs are placed by: their training step, to scale or in order, or the order in which they are given."""

    STEPS = "steps"
    ORDER = "order"
    GIVEN = "given"


@dataclass(frozen=True)
class Step:
    """A point of a training: its phase, `stage1` or empty, and the step within it."""

    phase: str
    step: int

    def order(self) -> tuple[Any, ...]:
        """Sorts stages of pretraining by their number, then other phases by theirs: `lc-4k-to-32k`, `lc-32k-to-64k`."""
        numbers = tuple(int(number) for number in re.findall(r"\d{1,15}", self.phase))
        return (not re.fullmatch(r"(stage\d*)?", self.phase), numbers, self.phase, self.step)

    def __str__(self) -> str:
        step = f"{self.step / 1000:,g}k" if self.step >= 1000 else str(self.step)
        return f"{self.phase} {step}".strip()


def main() -> int:
    """Runs `python -m qk_sniffer.plasticity.compare`; returns the exit code."""
    return program.run("qk_sniffer.plasticity.compare", __doc__ or "", Settings, compare)


def compare(settings: Settings) -> int:
    """Draws the figure; returns the exit code.

    Raises:
        ConfigError: a setting is wrong.
        StoreError: a run has no results, or the figure cannot be written.
        QkSnifferError: matplotlib is not installed.
    """
    folders = [Path(expand_home(name)) for name in settings.runs.split(",") if name]
    problems = []
    if not folders:
        problems.append("runs is empty; give folders of results, separated by commas")
    problems += [f"runs has {str(each)!r}, which {why}" for each in folders if (why := path_problem(each)) is not None]
    if settings.output.suffix != ".png":
        problems.append(f"output is {str(settings.output)!r}; it must end with .png")
    if problems:
        raise ConfigError(problems)
    if find_spec("matplotlib") is None:
        raise QkSnifferError(f"the figure needs matplotlib, which is not installed: {INSTALL}")
    runs = [read(Results(folder)) for folder in folders]
    refuse_inside(settings.output, "output")
    with explained(settings.output.parent, "make"):
        make_folder(settings.output.parent)
    files = save(settings.output.with_suffix(""), lambda: draw(runs), suffixes=PAPER_SUFFIXES)
    say(f"{counted(len(runs), 'run')}: {', '.join(map(str, files))}")
    for line in differences(runs):
        say(line)
    return 0


def read(results: Results) -> Run:
    """Reads the results in a folder.

    Raises:
        StoreError: the folder has no finished results.
    """
    record = results.record()
    model = record["dataset"]["model"]
    intervals = results.table("head_intervals", record)
    is_corrected = bool(len(intervals["value"]))
    pairs = (is_corrected and corrected(results.table("head_bucket_intervals", record))) or results.table(
        "head_bucket_plasticity", record
    )
    _, _, means = by_head_and_bucket(pairs)
    known = np.flatnonzero(np.isfinite(means))
    means = means[known[0] : known[-1] + 1] if len(known) else means[:0]
    heads = results.table("head_metrics", record)["ap_overall"]
    if is_corrected:
        heads = intervals["corrected"][intervals["quantity"] == "ap_overall"]
    heads = heads[np.isfinite(heads)]
    estimator = record["settings"]["estimator"]["name"]
    of_means = results.table("mean_intervals", record)
    found, null = of_all(of_means, "ap_overall"), of_all(of_means, "ap_null").corrected
    middle = found.corrected if np.isfinite(found.corrected) else float(heads.mean()) if len(heads) else np.nan
    mean = middle, found.low, found.high
    name, revision = model_name(model), model["revision"]
    texts = record["dataset"]["texts"]
    return Run(results.folder.name, name, texts, revision, estimator, heads, means, mean, null)


def step_of(run: Run) -> Step | None:
    """Returns the training step of a run's model, from its revision or else its name."""
    for text in (run.revision, run.model):
        # A name of someone else may have any length, and any number of digits.
        if found := re.search(r"(?:((?:stage\d*|lc)[\w-]*?)[-_])?step[-_]?(\d{1,15})(?!\d)", text[:_NAME_LENGTH]):
            return Step(found[1] or "", int(found[2]))
    return None


def in_order(runs: Sequence[Run]) -> tuple[Sequence[Run], list[str], Float64, Axis]:
    """Returns the runs in the order of the figure, their labels and places, and what they are placed by."""
    found = [step_of(run) for run in runs]
    steps = sorted(
        ((step, run) for step, run in zip(found, runs, strict=True) if step), key=lambda each: each[0].order()
    )
    places = np.arange(len(runs), dtype=float)
    kind = Axis.GIVEN
    if len(steps) == len(runs):
        runs, labels = [run for _, run in steps], [str(step) for step, _ in steps]
        numbers = np.array([step.step for step, _ in steps], dtype=float)
        is_growing = len(runs) > 1 and bool((np.diff(numbers) > 0).all())
        kind = Axis.STEPS if is_growing else Axis.ORDER
        places = numbers if is_growing else places
    else:
        labels = names(runs)
    return runs, labels, places, kind


def differences(runs: Sequence[Run]) -> Iterator[str]:
    """Yields a line for each run after the first of the figure: the difference of the means, and its interval.

    The results do not store how the errors of two runs go together, which they do with texts in common. Whatever they
    do, the standard error of a difference is at most the sum of both. So the interval reaches from the least difference
    of two numbers in the intervals of the runs to the largest: 95 % or more.
    """
    runs, labels, _, _ = in_order(runs)
    for run, label in zip(runs[1:], labels[1:], strict=True):
        mean, low, high = run.mean
        first_mean, first_low, first_high = runs[0].mean
        if np.isfinite(mean - first_mean):
            line = f"  {label}: mean of heads {mean - first_mean:+.4f} from {labels[0]}"
            if np.isfinite([low, high, first_low, first_high]).all():
                line += f" (interval of at least 95 %: {low - first_high:+.4f} to {high - first_low:+.4f})"
            yield line


def title(runs: Sequence[Run]) -> str:
    """Returns what all runs have in common of the model, the texts and the revision, and their estimators."""
    common = [
        f"{word}{values.pop()}"
        for word, values in (
            ("", {f"{run.model}{at_revision({'revision': run.revision})}" for run in runs}),
            ("on ", {run.texts for run in runs}),
        )
        if len(values) == 1
    ]
    estimators = sorted({run.estimator.replace("_", " ") for run in runs})
    noun = "estimator" if len(estimators) == 1 else "estimators"
    return as_text(", ".join(filter(None, [" ".join(common), f"{noun}: {', '.join(estimators)}"])))


def draw(runs: Sequence[Run]) -> "Figure":
    """Plasticity of all heads of each run, and its mean over relative query buckets."""
    runs, labels, places, kind = in_order(runs)
    labels = [*map(as_text, labels)]
    columns = max(1, min(5, int(PAGE_IN / (0.06 * max(map(len, labels)) + 0.5))))
    drawn = figure(PAGE_IN, 3.1 + 0.15 * -(-len(runs) // columns))
    left, right = drawn.subplots(1, 2, sharey=True)
    of_runs(left, runs, labels, places, kind)
    over_buckets(right, runs, labels)
    drawn.suptitle(title(runs), fontsize=8)
    drawn.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=6)
    return drawn


def names(runs: Sequence[Run]) -> list[str]:
    """Returns labels that distinguish the runs: models, texts, revisions and estimators that differ, or the folders."""
    parts = [(run.model, run.texts, run.revision, run.estimator.replace("_", " ")) for run in runs]
    differ = [column for column in zip(*parts, strict=True) if len(set(column)) > 1] or [
        tuple(run.model for run in runs)
    ]
    texts = [", ".join(words) for words in zip(*differ, strict=True)]
    return texts if len(set(texts)) == len(texts) else [run.folder for run in runs]


def of_runs(axes: "Axes", runs: Sequence[Run], labels: Sequence[str], places: Float64, kind: Axis) -> None:
    """The mean over heads with its interval, its value without drift, and the middle half and nine tenths of heads."""
    none = np.full(1, np.nan)
    heads = [run.heads if len(run.heads) else none for run in runs]
    quantiles = np.array([np.quantile(values, [0.05, 0.25, 0.75, 0.95]) for values in heads])
    for low, high, width, label in ((0, 3, 1.0, "90 % of heads"), (1, 2, 4.0, "50 % of heads")):
        axes.vlines(places, quantiles[:, low], quantiles[:, high], color=GREY, linewidth=width, label=label)
    mean, low, high = np.array([run.mean for run in runs]).T
    line = "none" if kind is Axis.GIVEN else "-"
    axes.plot(
        places, mean, color=BLUE, linestyle=line, marker="o", markersize=4.5, linewidth=1.5, label="mean of heads"
    )
    if np.isfinite(low).any():
        axes.vlines(places, low, high, color=BLUE, linewidth=1.5, label="its 95 % interval")
    null = np.array([run.null for run in runs])
    if np.isfinite(null).any():
        axes.plot(places, null, "_", color=BLACK, markersize=9, markeredgewidth=1.5, label="without drift")
    if kind is Axis.STEPS:
        if places[0] > 0 and places[-1] > MOST_LINEAR * places[0]:
            axes.set_xscale("log")
        axes.set_xlabel("training step")
    else:
        axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(runs) - 0.5)
        axes.set_xlabel("training step (in order, not to scale)" if kind is Axis.ORDER else "")
    axes.set_ylabel(PLASTICITY)
    axes.grid(axis="y", linewidth=0.3)
    # Above the panel, where it hides nothing.
    axes.legend(fontsize=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0)


def over_buckets(axes: "Axes", runs: Sequence[Run], labels: Sequence[str]) -> None:
    """A line for each run, from dark to light in their order, with a mark of its own to tell them apart in grey."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(runs)))
    for number, (run, label, colour) in enumerate(zip(runs, labels, colours, strict=True)):
        places = np.linspace(0, 1, len(run.by_bucket)) if len(run.by_bucket) > 1 else np.ones(len(run.by_bucket))
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(places, run.by_bucket, color=colour, marker=marker, markersize=3, linewidth=1.2, label=label)
    axes.set(xlabel="query bucket, from the first (0) to the last (1)", title="mean of heads")
    axes.grid(axis="y", linewidth=0.3)


if __name__ == "__main__":
    sys.exit(main())
