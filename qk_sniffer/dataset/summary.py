"""Prints the summary of a finished job: the size of the dataset, its place, and code that reads it."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.dataset.proof_words import attention, compared, of_rows, of_statistics, of_summaries, whence
from qk_sniffer.dataset.weights import computed_in, quantized
from qk_sniffer.hub.branch import Branch
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Files
from qk_sniffer.store.layout import head_file
from qk_sniffer.store.statistics import stages_of
from qk_sniffer.text import counted, is_utf8_path, python_literal, say, say_text, shortened

_READ_FOLDER = """\
Read it in Python:
  import pandas as pd
  head = pd.read_parquet({file})
  print(head[["bucket", "example_id", "position", "vector"]].head())"""

_READ_BRANCH = """\
Read it in Python:
  import qk_sniffer
  dataset = qk_sniffer.open_dataset({repo_id}, revision={name})
  vectors, positions, example_ids = dataset.vectors(*dataset.heads[0])"""

_READ_STATISTICS = """\
Read them in Python:
  import qk_sniffer
  dataset = qk_sniffer.open_dataset({where})
  statistics = dataset.statistics({layer}, "{kind}", "{stage}")
  print(statistics.heads, statistics.mean)"""


def show(dataset: Files, manifest: Mapping[str, Any], note: str) -> None:
    """Prints the examples, rows, heads, files and size of a dataset, then `note`, then code that reads it."""
    files = manifest["files"]
    heads = manifests.heads(manifest)
    size_mb = sum(entry["bytes"] for entry in files.values()) / 1e6
    examples = counted(manifest["examples"], "example")
    if "texts" in manifest:
        examples += f" (parts of {counted(manifest['texts'], 'text')})"
    counts = f"{examples}, {counted(manifest['tokens'], 'token')}"
    rows = f"{counted(manifest['rows'], 'row')} of {counted(len(heads), 'head')}"
    say(f"{rows}, from {counts}; {counted(len(files), 'file')}, {size_mb:,.1f} MB.")
    model = manifest["model"]
    say(f"Computed in {computed_in(model['dtype'], model.get('checkpoint_dtype'))}.")
    if quantization := model.get("quantization"):
        say(f"The model's weights are quantized with {quantized(quantization)}.")
    if cut := manifest["truncated_examples"]:
        tokens = manifest.get("truncated_tokens")
        lost = "" if tokens is None else f": {counted(tokens, 'token')} left out in all"
        say(f"{counted(cut, 'example')} cut to model.tokenizer.max_length{lost}.")
    if beyond := manifest.get("examples_beyond_max_positions"):
        limit = counted(manifest["model"]["max_positions"], "token")
        say(
            f"{counted(beyond, 'example')} longer than the {limit} that the model's config provides for "
            "(max_position_embeddings): captured as the model computes them."
        )
    if skipped := manifest["skipped_rows"]:
        say(f"{counted(skipped, 'empty example')} left out.")
    added, own = manifest["tokenizer"].get("special_tokens", {}), manifest.get("own_special_tokens", {})
    for side, verb in (("before", "begin"), ("after", "end")):
        if own.get(side):
            texts = f"{counted(own[side], 'text')} {verb}{'s' if own[side] == 1 else ''} with"
            say(f"{texts} {''.join(added.get(side, ()))} already, which was not added again.")
    if not manifest["rows"]:
        if "statistics" in manifest and manifest["config"]["sampler"]["type"] == "none":
            say("sampler=none keeps no rows: the dataset has statistics.")
        else:
            say("The sampler kept no row: raise sampler.base_rate.")
    listed = manifest.get("nonfinite_rows", {})
    if nonfinite := {head_file(*key): listed[head_file(*key)] for key in heads if head_file(*key) in listed}:
        rows, heads_with = counted(sum(nonfinite.values()), "row"), counted(len(nonfinite), "head")
        say(f"{rows} of {heads_with} hold NaN or infinite numbers, kept as the model computed them.")
    facts = manifest.get("statistics", {})
    if facts and not facts["tokens"]:
        others = "" if manifest["config"]["sampler"].get("segments") is None else ", or other sampler.segments"
        say(f"The statistics have no token: set a smaller capture.statistics.skip_tokens{others}.")
    if nonfinite := facts.get("nonfinite"):
        vectors, heads_with = counted(sum(nonfinite.values()), "vector"), shortened([*nonfinite], 6)
        say(f"Statistics leave out {vectors} with NaN or infinite numbers: {heads_with}.")
    if overflow := facts.get("overflow"):
        say(f"Statistics have NaN for numbers that float32 cannot hold: {shortened(overflow, 6)}.")
    proof = manifest["proof"]
    if proof["proven"]:
        layers = len({head.layer for head in heads})
        statistics = of_statistics(proof, heads=len(heads), layers=layers, examples=manifest["examples"])
        if of_rows(proof):
            rows = compared(proof, heads=len(heads), layers=layers)
            summaries = of_summaries(proof, heads=sum(head.kind == "q" for head in heads), layers=layers)
            rows += f"; {summaries}" if summaries else ""
            whole = f"{rows}; {attention(proof)}; from {whence(proof, manifest['examples'])}"
            say(f"Proven: {whole}{f'; {statistics}' if statistics else ''}.")
        else:
            say(f"Proven: {statistics}; {attention(proof)}.")
    elif proof["proven"] is None:
        say(f"Not proven: {proof['reason']}" + (f"; {attention(proof)}." if "attention" in proof else "."))
    say(note)
    say(f"Dataset: {dataset}")
    if not manifest["rows"] and "statistics" in manifest:
        head = heads[0]
        stage = stages_of(head.kind, manifest["config"]["capture"]["statistics"]["stages"])[0]
        where = python_literal(str(dataset))
        if isinstance(dataset, Branch):
            where = f"{python_literal(dataset.repo_id)}, revision={python_literal(dataset.name)}"
        say_text(_READ_STATISTICS.format(where=where, layer=head.layer, kind=head.kind, stage=stage))
    elif isinstance(dataset, Branch):
        say_text(_READ_BRANCH.format(repo_id=python_literal(dataset.repo_id), name=python_literal(dataset.name)))
    else:
        path = str(dataset.path(head_file(*heads[0])))
        literal = python_literal(path)
        # pandas opens no other path itself.
        say_text(_READ_FOLDER.format(file=literal if is_utf8_path(path) else f'open({literal}, "rb")'))
