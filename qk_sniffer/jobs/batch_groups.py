"""Groups the batches of a job with statistics: the statistics of a group become durable together."""

from collections.abc import Iterable, Iterator, Sequence

from qk_sniffer.capture.forward_cost import ForwardCost
from qk_sniffer.corpus.batches import Window
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.resolved import ResolvedConfig

GROUP = 16
"""The arithmetic of a group of batches with statistics, in `ForwardCost.few`: that of a few minutes."""

GROUP_IDS = 1 << 21
"""The characters of ids from which on a group ends. One header of the journal lists the ids of a group."""


def group_flops(config: ResolvedConfig, cost: ForwardCost) -> float:
    """The fewest operations of a group; without statistics, every batch is one."""
    return GROUP * cost.few if config.capture.statistics.enabled else 0.0


def grouped(windows: Iterable[Window], cost: ForwardCost, flops: float) -> Iterator[tuple[Sequence[Tokens], bool]]:
    """Yields each batch, and whether it is the last one of its group.

    A group is the fewest batches of a window that take `flops` operations, or have `GROUP_IDS`. It follows from the
    source alone: finished groups, which a restart leaves out, change no other group.
    """
    for window in windows:
        done, ids = 0.0, 0
        for number, batch in enumerate(window.batches, start=1):
            done += float(cost.flops([example.num_tokens for example in batch]).sum())
            ids += sum(len(example.source_id) for example in batch)
            is_last = done >= flops or ids >= GROUP_IDS or number == len(window.batches)
            done, ids = (0.0, 0) if is_last else (done, ids)
            yield batch, is_last
