"""Reads what formats need from a dataset, and words what a dataset lacks or has beyond a format.

Each method that returns problems yields one line for each: the reason, and what to capture instead.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import KIND_SETTINGS, STAGE_NAMES, Config, StatisticsConfig, from_dict
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import KEY_HEAD_KINDS, KIND_NAMES, WIDTHS, head_name
from qk_sniffer.store.statistics import Statistics
from qk_sniffer.text import compact_ranges, counted, shortened

Floats = npt.NDArray[np.float64]

_CAPTURE_ALL = (
    "capture all with capture.layers=null, capture.full_attention_only=false and capture.head_sampling.count=null"
)

_WHOLE = "the method needs RoPE over whole heads, in halves"
_NO_ROPE = f"have no RoPE, and {_WHOLE}"
_LEAVE_OUT = ": leave them out with capture.layers, if the method does not run there"


class Source:
    """A dataset with statistics, for an export."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.model: dict[str, Any] = dataset.manifest["model"]
        self.notes: dict[str, Any] = {}
        """What a format adds to the provenance."""

    @cached_property
    def config(self) -> Config:
        """The settings of the capture."""
        return from_dict(self.dataset.manifest["config"])

    @property
    def settings(self) -> StatisticsConfig:
        """The settings of the statistics."""
        return self.config.capture.statistics

    @cached_property
    def layers(self) -> list[dict[str, Any]]:
        """The captured layers, ascending, as the manifest describes them."""
        captured = [layer for layer in self.model["layers"] if any(layer["captured"].values())]
        return sorted(captured, key=lambda layer: layer["layer"])

    @property
    def num_layers(self) -> int:
        """The layers of the model, with attention or not."""
        number: int = self.layers[-1]["layer"] + 1
        return max(self.model.get("num_layers") or 0, number)

    @property
    def shape(self) -> dict[str, int]:
        """num_q_heads, num_k_heads and head_dim, where all layers have the same."""
        return {name: self.layers[0][name] for name in ("num_q_heads", "num_k_heads", "head_dim")}

    def statistics(self, layer: dict[str, Any], kind: str, stage: str, *, covariance: bool = False) -> Statistics:
        """Returns the statistics of a layer's captured heads, each of which has two tokens or more.

        The numbers of these statistics are finite; without `covariance`, all but covariances and norms.

        With `covariance`, there is one. At the stage pre of a layer that `needs_whole_rotation` accepts, there are
        frequencies.

        Raises:
            StoreError: a head has fewer tokens, or numbers that float32 cannot hold; the file cannot be read, or
                contradicts the manifest.
            HubError: the file cannot be fetched.
        """
        number = layer["layer"]
        found = self.dataset.statistics(number, kind, stage)
        expected = (sorted(layer["captured"].get(kind, [])), layer[WIDTHS[kind]])
        is_as_described = (found.heads.tolist(), found.mean.shape[1]) == expected
        if stage == "pre" and isinstance(layer.get("rotation"), dict):
            f = len(self.frequencies(layer)[0])
            is_as_described &= found.frequency_pairs is not None and len(found.frequency_pairs) == f
        if not is_as_described or (covariance and found.covariance is None):
            raise StoreError(
                f"{self.dataset}: the statistics of layer {number} are not of the heads that manifest.json describes: "
                "fetch the dataset again, or recreate it with output.overwrite=true"
            )
        needed = [found.mean, found.minimum, found.maximum]
        needed += [
            one for one in (found.frequency_modulus, found.covariance if covariance else None) if one is not None
        ]
        leave_out = "leave the head out with capture.heads, or the layer with capture.layers"
        counts = zip(found.heads.tolist(), found.count.tolist(), found.nonfinite.tolist(), strict=True)
        for index, (head, count, nonfinite) in enumerate(counts):
            of_head = f"{self.dataset}: the statistics of {head_name(number, head, kind)}"
            if count < 2 and nonfinite:
                raise StoreError(
                    f"{of_head} at the stage {stage} are of {counted(count, 'token')}, because "
                    f"{counted(nonfinite, 'vector')} with NaN or infinite numbers are left out: {leave_out}"
                )
            if count < 2:
                raise StoreError(
                    f"{of_head} are of {counted(count, 'token')}: {', or '.join(self._ways_to_more_tokens())}"
                )
            if not all(np.isfinite(array[index]).all() for array in needed):
                raise StoreError(f"{of_head} at the stage {stage} have numbers that float32 cannot hold: {leave_out}")
        return found

    def needs(self, stage: str, kind: str, *, covariance: bool = False) -> Iterator[str]:
        """Yields the problem that the dataset lacks the statistics of a stage and kind, or their covariances."""
        name = KIND_NAMES[kind]
        wanted = f"statistics of {name} vectors {STAGE_NAMES[stage]}"
        setting = f"'capture.statistics.stages=[{stage}]'"
        if not self._has(kind):
            yield f"it has no {name} vectors: capture with {KIND_SETTINGS[kind]}=true"
        if not self.settings.enabled:
            yield f"it has no {wanted}: capture with capture.statistics.enabled=true and {setting}"
        elif stage not in self.settings.stages:
            has = " and ".join(STAGE_NAMES[one] for one in self.settings.stages)
            yield f"it has statistics {has}, and no {wanted}: capture with {setting}"
        elif covariance and not self.settings.covariance:
            yield "it has variances without covariances: capture with capture.statistics.covariance=true"

    def needs_one_shape(self, *names: str) -> Iterator[str]:
        """Yields the problem of layers that differ in one of `names`: num_q_heads, num_k_heads, head_dim."""
        for name in names:
            if len(found := sorted({layer[name] for layer in self.layers})) > 1:
                yield f"its layers differ in {name} ({', '.join(map(str, found))}), and the format has one for all"

    def needs_all_layers(self) -> Iterator[str]:
        """Yields the problem of layers without vectors: not captured, or without self-attention."""
        if missing := set(range(self.num_layers)) - {layer["layer"] for layer in self.layers}:
            nothing = f"it has nothing of layers {compact_ranges(missing)}, which"
            if self._selects_layers or missing & {layer["layer"] for layer in self.model["layers"]}:
                yield (
                    f"{nothing} were not captured or have no self-attention, and the format has every layer of the "
                    f"model: {_CAPTURE_ALL}"
                )
            else:
                yield (
                    f"{nothing} have no self-attention, and the format has every layer of the model: no capture of "
                    "this model can be exported to it"
                )

    def needs_all_attention_layers(self) -> Iterator[str]:
        """Yields the problem of layers that have attention and were not captured."""
        present = {layer["layer"] for layer in self.layers}
        missing = {layer["layer"] for layer in self.model["layers"]} - present
        if self._selects_layers:  # the manifest does not list the layers after the last captured one
            missing |= set(range(max(present) + 1, self.num_layers))
        if missing:
            yield f"it has nothing of layers {compact_ranges(missing)}, which have attention: {_CAPTURE_ALL}"

    def needs_all_heads(self, kind: str) -> Iterator[str]:
        """Yields the problem of captured layers with heads that were not captured, if others of the kind were."""
        if not self._has(kind):
            return
        missing = [
            head_name(layer["layer"], head, kind)
            for layer in self.layers
            for head in range(layer["num_k_heads" if kind in KEY_HEAD_KINDS else "num_q_heads"])
            if head not in layer["captured"].get(kind, ())
        ]
        if missing:
            yield (
                f"it has nothing of the heads {shortened(missing, 6)}, and the format has every head of a layer: "
                "capture with capture.heads=null and capture.head_sampling.count=null"
            )

    def needs_no_bias(self) -> Iterator[str]:
        """Yields the problem of layers that add a bias to the logits."""
        if biased := self._layers_where(lambda layer: layer.get("position_bias")):
            yield f"layers {biased} add a bias by position to the logits, which the method does not know"

    def needs_whole_rotation(self, *, of_every_layer: bool = False) -> Iterator[str]:
        """Yields the problems of layers whose queries do not turn as a whole in halves: component i with i + d/2.

        `of_every_layer` is for a format from which no layer can be left out.
        """
        for reason, layers in self._grouped((layer["layer"], self._rotation_problem(layer)) for layer in self.layers):
            way_out = _LEAVE_OUT if reason == _NO_ROPE and not of_every_layer else ""
            yield f"layers {compact_ranges(layers)} {reason}{way_out}"

    def frequencies(self, layer: dict[str, Any]) -> tuple[Floats, float]:
        """Returns the frequencies (f,) and the attention scaling of a layer that is rotated.

        Raises:
            StoreError: the manifest does not have them.
        """
        name = layer["rotation"]["frequencies"]
        try:
            found = self.model["rotary"]["frequencies"][name]
            return np.array(found["inv_freq"], np.float64).reshape(-1), float(found["attention_scaling"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.dataset}: manifest.json has no frequencies {name!r}, by which layer {layer['layer']} rotates: "
                "fetch the dataset again, or recreate it with output.overwrite=true"
            ) from error

    def rope_parameters(self) -> list[dict[str, Any]]:
        """Returns the `rope_parameters` of the model's config: one mapping, or one for each kind of layer."""
        named = self.model["rotary"].get("rope_parameters")
        if not isinstance(named, dict):
            return []
        return [value for value in named.values() if isinstance(value, dict)] or [named]

    def provenance(self) -> dict[str, Any]:
        """Returns where the numbers come from, as plain data for JSON."""
        manifest = self.dataset.manifest
        fingerprint, commits = manifest["fingerprint"], manifest["commits"]
        return {
            "made_by": f"qk-sniffer {version('qk-sniffer')}",
            "versions": manifest.get("versions"),
            "model": fingerprint["model.name"],
            "model_commit": commits["model"],
            "adapter": fingerprint.get("model.adapter"),
            "adapter_commit": commits.get("adapter"),
            "dtype": self.model["dtype"],
            "dataset": fingerprint["dataset.path"],
            "dataset_name": fingerprint.get("dataset.name"),
            "dataset_split": fingerprint.get("dataset.split"),
            "dataset_commit": commits["dataset"],
            "examples": manifest["examples"],
            "tokens": manifest["tokens"],
            "longest_example": manifest["longest_example"],
            "skip_tokens": self.settings.skip_tokens,
            "segments": self.config.sampler.segments,
            "chat_template": manifest["tokenizer"].get("chat_template"),
            "nonfinite": manifest.get("statistics", {}).get("nonfinite", {}),
            "vectors_commit": self.dataset.commit,
            "manifest_sha256": hashlib.sha256(manifests.encode(manifest)).hexdigest(),
            **self.notes,
        }

    def _ways_to_more_tokens(self) -> Iterator[str]:
        yield "capture longer texts"
        if self.settings.skip_tokens:
            yield "set a smaller capture.statistics.skip_tokens"
        if self.config.sampler.segments is not None:
            yield "other sampler.segments"

    def _has(self, kind: str) -> bool:
        return any(layer["captured"].get(kind) for layer in self.layers)

    @property
    def _selects_layers(self) -> bool:
        capture = self.config.capture
        return capture.layers is not None or capture.full_attention_only or capture.head_sampling.count is not None

    def _rotation_problem(self, layer: dict[str, Any]) -> str | None:
        rotation = layer.get("rotation")
        if rotation is None:
            return _NO_ROPE
        if isinstance(rotation, str):
            return f"have a rotation that is {rotation}, and {_WHOLE}"
        if rotation["pairs"] != "halves":
            return f"rotate neighbouring components ({rotation['pairs']}), and {_WHOLE}"
        rotated = 2 * len(self.frequencies(layer)[0])
        if rotated != layer["head_dim"]:
            return f"rotate {rotated} of {layer['head_dim']} components, and {_WHOLE}"
        if rotation["direction"] != 1:
            return f"rotate in the other direction, and {_WHOLE}"
        if rotation["changed_after"]:
            return "scale or normalize queries after RoPE, so that statistics before RoPE are not of what attends"
        return None

    def _layers_where(self, condition: Any) -> str:
        return compact_ranges(layer["layer"] for layer in self.layers if condition(layer))

    @staticmethod
    def _grouped(pairs: Iterable[tuple[int, str | None]]) -> Iterator[tuple[str, list[int]]]:
        groups: dict[str, list[int]] = {}
        for layer, reason in pairs:
            if reason is not None:
                groups.setdefault(reason, []).append(layer)
        yield from groups.items()
