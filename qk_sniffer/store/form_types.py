"""Declares the types and limits of single values in stored files, such as the number of a head or a commit."""

from typing import Annotated, Literal, get_args

from msgspec import Meta

from qk_sniffer.config import MOST_COUNT, MOST_HEAD_DIM, MOST_SLUG, STAGES
from qk_sniffer.store.layout import KINDS

MOST_LAYERS = 2_000
MOST_HEADS = 10_000
"""The most heads of a kind in one layer."""

MOST_FILES = 1 << 17
"""The most heads of a dataset, each of which is a file."""

MOST_BUCKETS = 1 << 20
"""The most buckets of positions that results are drawn by."""

MOST_NUMBER = 3e38
"""The largest absolute value of a number that is not an integer: one of float32."""

Kind = Literal["q", "k", "v", "o"]
assert get_args(Kind) == KINDS

Stage = Literal["pre", "post"]
assert get_args(Stage) == STAGES

HeadNumber = Annotated[int, Meta(ge=0, lt=MOST_HEADS)]
HeadDim = Annotated[int, Meta(ge=1, le=MOST_HEAD_DIM)]
NumHeads = Annotated[int, Meta(ge=1, le=MOST_HEADS)]
Bucket = Annotated[str, Meta(pattern=r"\A[0-9]{1,10}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Commit = Annotated[str, Meta(pattern=r"\A[0-9a-f]{40}\Z")]
CommitOrDigest = Annotated[str, Meta(pattern=r"\A([0-9a-f]{40}|sha256:[0-9a-f]{64})\Z")]
_HUB_NAME = "[A-Za-z0-9_]([A-Za-z0-9_.-]{0,98}[A-Za-z0-9_])?"
RepoId = Annotated[str, Meta(pattern=rf"\A{_HUB_NAME}/{_HUB_NAME}\Z")]
Slug = Annotated[str, Meta(pattern=rf"\A[A-Za-z0-9._-]{{1,{MOST_SLUG}}}\Z")]
ExampleId = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
BatchSize = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
Number = Annotated[float, Meta(ge=-MOST_NUMBER, le=MOST_NUMBER)]
"""A number that fits float32, and not NaN; also an integer."""

Positive = Annotated[float, Meta(gt=0, le=MOST_NUMBER)]
