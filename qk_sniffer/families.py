"""Offers what a family of one's own builds on; `models/ADDING.md` describes it.

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
