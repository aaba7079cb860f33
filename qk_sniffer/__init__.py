"""qk-sniffer: query and key vectors of transformer attention heads, as Parquet datasets."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "conf").is_dir():
    # A checkout keeps `conf/` and `models/` beside this package, a wheel inside it. Either way they are
    # imported as `qk_sniffer.conf` and `qk_sniffer.models`, so that a folder of the same name in the
    # current directory, or another distribution's `models`, can never be taken for ours.
    __path__.append(str(_here.parent))
