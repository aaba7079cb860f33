"""Exports the base class of model families and its helpers, for families of your own; see `models/ADDING.md`.

A file of `models/`, or a class that `model.family` names, imports this module.
"""

from qk_sniffer.backbone.family import (
    NO_SELF_ATTENTION,
    CallSpy,
    Family,
    QueryKey,
    RotaryCall,
    heads_first,
)

__all__ = ["NO_SELF_ATTENTION", "CallSpy", "Family", "QueryKey", "RotaryCall", "heads_first"]
