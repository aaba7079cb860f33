"""Describes finished batches on their way to the journal, and their size in the header of a segment."""

import json
from dataclasses import dataclass
from functools import cached_property

from qk_sniffer.store.journal import AttentionFacts, ExampleRecord, values_of
from qk_sniffer.store.segment import Tensor
from qk_sniffer.store.stored import LARGE

MOST_METADATA = LARGE * 3 // 4
"""The most bytes of the facts of finished batches in the header of a segment."""

_NUMBERS_BYTES = 80
"""The most bytes of the names in the facts of a batch, and of its numbers."""


@dataclass(frozen=True, eq=False)
class FinishedBatch:
    """A batch whose rows are all committed."""

    number: int
    records: tuple[ExampleRecord, ...]
    checks: tuple[AttentionFacts, ...]

    @cached_property
    def metadata_bytes(self) -> int:
        """The bytes of its facts in the header of a segment, which is JSON that holds JSON."""
        facts = self._records + (json.dumps(self.checks) if self.checks else "")
        return _NUMBERS_BYTES + len(facts) + facts.count('"') + facts.count("\\")

    def ended(self, since: int) -> str:
        """Returns its facts in the segment that ends it, in JSON; `since` is the segment that it starts in."""
        checks = f', "checks": {json.dumps(self.checks)}' if self.checks else ""
        return f'{{"batch": {self.number}, "since": {since}, "records": {self._records}{checks}}}'

    @cached_property
    def _records(self) -> str:
        return json.dumps([*map(values_of, self.records)])


@dataclass(frozen=True, eq=False)
class GroupEnd:
    """The end of a group of batches, which become durable together."""

    batches: tuple[FinishedBatch, ...]
    statistics: tuple[Tensor, ...]
    metadata_bytes: int
    """The bytes of the facts of its batches in the header of a segment."""
    at: float

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.statistics)
