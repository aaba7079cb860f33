"""Writes the statistics of a dataset in the file formats that KV-cache methods read.

`qk_sniffer.export(dataset, "triattention", path)` is the function `export` of `write.py`: this package can be called.
`python -m qk_sniffer.export` is the program. `docs/kv_cache.md` describes the methods.
"""

from qk_sniffer.callable_package import make_callable

make_callable(__name__, "qk_sniffer.export.write")
