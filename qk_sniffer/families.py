"""Exports the base class of model families and its helpers, for families of your own; see `models/ADDING.md`.

A file of `models/`, or a class that `model.family` names, imports this module.
"""

from qk_sniffer.hub.endpoint import check_address

check_address()  # the next import loads libraries that quote a part of an address that they cannot read

from qk_sniffer.backbone.family import (  # noqa: E402
    NO_SELF_ATTENTION,
    CallSpy,
    Family,
    QueryKey,
    RotaryCall,
    heads_first,
)

__all__ = ["NO_SELF_ATTENTION", "CallSpy", "Family", "QueryKey", "RotaryCall", "heads_first"]
