"""Watches key-value caches: which keys of an attention call are new, and that a cache only grows.

An attention module passes its new keys to `update` of a cache of transformers, and attends to the keys that this
returns. `CacheWatch` notes both, for the thread that opened it. A cache holds one key for each token of a row, in
order. What moves, removes or changes its keys is refused by name: beam search, assisted decoding, quantized caches, and
layers of caches that are not known.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from qk_sniffer.errors import CaptureError

_SERVED = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "StaticIndexedLayer",
    "MiniMaxM3VLSparseCacheLayer",
    "MiniMaxM3VLSparseStaticCacheLayer",
}
"""The layers of caches that hold the keys that they receive, in order, or the last ones of them."""

_MOVING = {
    "reorder_cache": "it is reordered, as in beam search",
    "crop": "tokens are removed from it, as in assisted decoding",
    "batch_repeat_interleave": "its rows are repeated, as in contrastive search",
    "batch_select_indices": "some of its rows are selected, as in contrastive search",
}
"""Methods of a cache after which its keys are those of other tokens, or of other rows."""

_WATCHED = ("update", "reset", *_MOVING)

_WAY_OUT = "generate with one beam and without an assistant model or draft tokens, and do not edit the cache"


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys of an attention call with n queries, all of them and the new ones: K key heads, m keys."""

    key: torch.Tensor
    """(B, K, n, d): the new keys, one for each query."""
    value: Any
    """(B, K, n, w): their values; what the module passes, if it has another form."""
    attended: torch.Tensor
    """(B, K, m, d): the keys that the queries attend to, the new ones last."""
    past: int
    """The number of tokens in the cache before the new ones. A sliding cache has dropped keys of some: m < past + n."""
    arguments: dict[str, Any]
    """The other arguments of the kernel, with masks and biases of the m keys."""


@dataclass(frozen=True, eq=False)
class CacheUpdate:
    """New keys that a module passed to its cache, and the keys that it attends to."""

    past: int
    """The number of tokens that the cache held before."""
    key: torch.Tensor
    value: Any
    returned_key: torch.Tensor
    returned_value: Any


@dataclass(frozen=True, eq=False)
class _Left:
    """A layer of a cache as its last update has left it."""

    total: int
    """The tokens in it; 0 if it was reset since."""
    tensors: "list[tuple[weakref.ref[torch.Tensor], int | None]]"
    """Its keys and values, each with the number of changes in place; None if torch does not count them."""

    @classmethod
    def of(cls, layer: Any, total: int) -> "_Left":
        return cls(total, [(weakref.ref(tensor), changes_of(tensor)) for tensor in _tensors(layer)])

    def is_as(self, layer: Any) -> bool:
        """Whether the tensors of `layer` are these, and unchanged."""
        now = _tensors(layer)
        return len(now) == len(self.tensors) and all(
            left() is tensor and changes == changes_of(tensor)
            for (left, changes), tensor in zip(self.tensors, now, strict=True)
        )


class CacheWatch:
    """Notes the updates of caches by one attention module at a time."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._updates: list[CacheUpdate] | None = None
        self._shared: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._watched: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._left: weakref.WeakKeyDictionary[Any, _Left] = weakref.WeakKeyDictionary()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Watches all caches of this thread inside the context."""
        replaced: list[tuple[type, str, Any]] = []
        try:
            for cls in _with_subclasses(Cache):
                for name in _WATCHED:
                    if (method := vars(cls).get(name)) is not None:
                        replaced.append((cls, name, method))
                        setattr(cls, name, self._watching(method, name))
            yield
        finally:
            for cls, name, method in reversed(replaced):
                setattr(cls, name, method)

    def begin(self) -> None:
        """Starts with the updates of another module."""
        self._updates = []

    def end(self) -> None:
        """Ends the module that runs. The keys that it attends to remain known: later layers may share them."""
        self._shared = [one for one in self._shared if one[0]() is not None]
        self._shared += [(weakref.ref(one.returned_key), one.past) for one in self._updates or []]
        self._updates = None

    def keys(self, n: int, key: torch.Tensor, value: Any, arguments: dict[str, Any]) -> Keys:
        """Returns the keys of a call with n queries of the module that runs, whose kernel receives these arguments.

        A family that shows only new keys has those that the cache returned as the attended ones.

        Raises:
            CaptureError: the kernel attends to a paged cache.
        """
        if arguments.get("cache") is not None:
            raise CaptureError(
                "a paged cache cannot be captured: its rows have several texts; use generate instead of generate_batch"
            )
        update = self._updates[-1] if self._updates else None
        past = self._past_of_shared(key) if update is None else update.past
        if past is None:
            return Keys(key, value, key, 0, arguments)
        attended = key
        if update is not None and key.shape[2] == n != update.returned_key.shape[2]:
            attended = update.returned_key
        end = min(past + n, attended.shape[2])  # a static cache has room for more
        if update is not None and key is update.returned_key:
            new_key = update.key
        else:
            new_key = key if key.shape[2] == n else key[:, :, end - n : end]
        if update is not None and value is update.returned_value:
            value = update.value
        elif isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2] == key.shape[2] != n:
            value = value[:, :, end - n : end]
        narrowed = {
            name: values[..., :end]
            for name in ("attention_mask", "position_bias")
            if isinstance(values := arguments.get(name), torch.Tensor) and values.dim() == 4 and values.shape[-1] > end
        }
        return Keys(new_key, value, attended[:, :, :end], past, arguments | narrowed)

    def _past_of_shared(self, key: torch.Tensor) -> int | None:
        """Returns the number of tokens before the pass, if `key` is that of an earlier layer; None if it is not."""
        return next((past for shared, past in reversed(self._shared) if shared() is key), None)

    def _watching(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        if name == "update":
            return self._noting(original)
        return self._emptying(original) if name == "reset" else self._refusing(original, name)

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(
            cache: Any, key_states: torch.Tensor, value_states: Any, layer_idx: int, *args: Any, **arguments: Any
        ) -> Any:
            updates = self._updates
            if updates is None or threading.get_ident() != self._thread:
                return original(cache, key_states, value_states, layer_idx, *args, **arguments)
            self._updates = None  # a cache may call the method that it overrides
            try:
                past = self._check(cache, layer_idx)
                returned = original(cache, key_states, value_states, layer_idx, *args, **arguments)
                self._note(cache, layer_idx, past + key_states.shape[2])
            finally:
                self._updates = updates
            updates.append(CacheUpdate(past, key_states, value_states, *returned))
            return returned

        return update

    def _emptying(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def reset(cache: Any, *args: Any, **arguments: Any) -> Any:
            returned = original(cache, *args, **arguments)
            for layer in getattr(cache, "layers", ()):
                if layer in self._left:
                    self._left[layer] = _Left(0, [])
            return returned

        return reset

    def _refusing(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def moving(cache: Any, *args: Any, **arguments: Any) -> Any:
            if threading.get_ident() == self._thread and cache in self._watched:
                raise CaptureError(f"{type(cache).__name__} cannot be captured: {_MOVING[name]}; {_WAY_OUT}")
            return original(cache, *args, **arguments)

        return moving

    def _check(self, cache: Any, layer: int) -> int:
        """Returns the number of tokens in a layer of a cache, which must be as its last update left it."""
        of_layer = _layer(cache, layer)
        past = 0 if of_layer is None else int(of_layer.get_seq_length())
        if past and of_layer in self._left:
            left = self._left[of_layer]
            if past != left.total or not (getattr(cache, "offloading", False) or left.is_as(of_layer)):
                same = "moved, replaced or changed"
                how = "removed" if past < left.total else "added" if past > left.total else same
                raise CaptureError(
                    f"{type(cache).__name__} cannot be captured: its keys or values were {how} between two forward "
                    f"passes; {_WAY_OUT}"
                )
        return past

    def _note(self, cache: Any, layer: int, total: int) -> None:
        of_layer = _layer(cache, layer)
        name = type(of_layer).__name__
        if "Quantized" in name:
            raise CaptureError(
                f"{type(cache).__name__} cannot be captured: it quantizes keys after they are shown, so that queries "
                "attend to others; generate without cache_implementation=quantized"
            )
        if name not in _SERVED:
            raise CaptureError(
                f"{type(cache).__name__} cannot be captured: whether {name} holds one key for each token is not known; "
                "use a DynamicCache"
            )
        if getattr(of_layer, "record_past", False):
            raise CaptureError(f"{type(cache).__name__} cannot be captured: {_MOVING['crop']}; {_WAY_OUT}")
        self._watched.add(cache)
        self._left[of_layer] = _Left.of(of_layer, total)


def _layer(cache: Any, layer: int) -> Any:
    return cache.layers[layer] if layer < len(cache.layers) else None


def _tensors(layer: Any) -> list[torch.Tensor]:
    """Returns the keys and values of a layer of a cache."""
    return [each for each in (layer.keys, layer.values) if isinstance(each, torch.Tensor)]


def changes_of(value: Any) -> int | None:
    """Returns how often a tensor was changed in place; None if it is none, or torch does not count, as of inference."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for other in cls.__subclasses__():
        yield from _with_subclasses(other)
