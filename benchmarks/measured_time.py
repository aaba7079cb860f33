"""Compares the time that `dry_run=measure` tells with that of the job, in turn, for three settings.

The time of the imports, which the dry run leaves out, is taken off that of the job, and so is the end of the process.

Run it as `python benchmarks/measured_time.py [--rounds N] [--texts N]`. The bar is 25 % on the machine that measured.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from statistics import median

SETTINGS = {
    "uniform": ["sampler=uniform", "sampler.base_rate=8"],
    "statistics": ["sampler=none", "capture.statistics.enabled=true"],
    "attention": ["sampler=uniform", "sampler.base_rate=8", "capture.attention.enabled=true"],
}
IMPORTS = (
    "import atexit, gc, qk_sniffer.cli.app, qk_sniffer.jobs.capture_examples, qk_sniffer.jobs.pictures; "
    "atexit.register(gc.freeze)"
)
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "days": 86_400.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=120)
    arguments = parser.parse_args()
    texts = f"dataset.max_samples={arguments.texts}"
    imports = median(seconds_of(["-c", IMPORTS]) for _ in range(3))
    for name, settings in SETTINGS.items():
        ratios = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                job = [*settings, texts, f"output.data_root={folder}/root"]
                told = told_by(job)
                ratios.append(told / (seconds_of(["-m", "qk_sniffer", *job]) - imports))
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name}: told / taken {median(ratios):.2f} ({shown}); bar 0.75 to 1.25", flush=True)


def told_by(job: list[str]) -> float:
    """Returns the seconds that the dry run tells for all stages together."""
    command = [sys.executable, "-m", "qk_sniffer", *job, "dry_run=measure"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    number, unit = re.findall(r"^together\s+.*?([\d.]+) (s|min|h|days)$", out, flags=re.MULTILINE)[-1]
    return float(number) * UNITS[unit]


def seconds_of(arguments: list[str]) -> float:
    """Returns the seconds of a run of Python."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
