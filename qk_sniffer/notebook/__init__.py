"""Captures the forward passes that the user runs in Python: `with qk_sniffer.capture(model) as captured:`."""
