"""Chooses rows, gathers them, and proves them.

`qk_sniffer.capture(model)` is the function `capture` of `qk_sniffer/notebook/captured.py`: this package can be called.
"""

from qk_sniffer.callable_package import make_callable

make_callable(__name__, "qk_sniffer.notebook.captured")
