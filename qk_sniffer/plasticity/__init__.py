"""Measures attention plasticity: how far the content of a query, not its position, decides between two keys.

`docs/plasticity.md` defines the measures. `python -m qk_sniffer.plasticity` is the program.
"""
