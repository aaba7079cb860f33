"""What a finished job leaves on the screen: what there is now, where, and how to read it."""

from pathlib import Path

from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import KINDS, parse_head_name

READING = """\
Read it in Python:
  import pandas as pd
  head = pd.read_parquet("{file}")
  print(head[["bucket", "example_id", "position", "vector"]].head())"""


def show(root: Path, note: str) -> None:
    """Prints the dataset at `root`: examples, rows, heads, files, size; `note`; and three lines that read it."""
    manifest = manifests.read(root)
    files = manifest["files"]
    keyed = [(parse_head_name(name.split("/")[0]), name) for name in files]
    heads = sorted((key.layer, KINDS.index(key.kind), key.head, name) for key, name in keyed if key is not None)
    size_mb = sum(entry["bytes"] for entry in files.values()) / 1e6
    counts = f"{manifest['examples']:,} examples, {manifest['tokens']:,} tokens"
    print(f"{manifest['rows']:,} rows of {len(heads)} heads, from {counts}; {len(files)} files, {size_mb:,.1f} MB.")
    for key, meaning in (
        ("truncated_examples", "were cut to model.tokenizer.max_length"),
        ("skipped_rows", "rows of the source had no text and were left out"),
    ):
        if manifest[key]:
            print(f"{manifest[key]:,} {meaning}.")
    if not manifest["rows"]:
        print("The sampler kept no row: raise sampler.base_rate.")
    proof = manifest["proof"]
    if proof["proven"]:
        largest = max(proof["largest_difference_by_layer"].values())
        count = len(proof["examples"])
        print(
            f"Proven: rows of {count} example(s), derived again by hooks, differ by {largest:.1g} at most (relative)."
        )
    elif proof["proven"] is None:
        print(f"Not proven: {proof['reason']}.")
    print(note)
    print(f"Dataset: {root}")
    print(READING.format(file=root / heads[0][-1]))
