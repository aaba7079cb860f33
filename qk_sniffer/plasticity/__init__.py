"""Attention plasticity of a dataset: how far what a query says, and not where it stands, decides between two keys.

`docs/plasticity.md` defines what is measured. `python -m qk_sniffer.plasticity` is the program.
"""
