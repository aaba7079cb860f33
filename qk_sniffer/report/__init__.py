"""Writes a report of a dataset: one HTML page with interactive maps of its heads, which needs no network.

`docs/report.md` describes the page. `python -m qk_sniffer.report` is the program.
"""
