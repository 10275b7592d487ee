"""What goes wrong, with the stable name of the reason that servers and clients in all languages share."""

from __future__ import annotations


class Error(Exception):
    """A call that failed.

    Attributes:
        reason: Stable name of what went wrong, such as ``"WORKER_LOST"``.
        outcome: ``"not_executed"``, ``"applied"`` or ``"unknown"``: what is known of the effect of the call.
    """

    def __init__(self, message: str, reason: str, outcome: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.outcome = outcome

    def __reduce__(self):
        return type(self), (self.args[0], self.reason, self.outcome)


class InvalidArgument(Error, ValueError):
    """A call that makes no sense, wherever that was seen: here, or on the cluster."""
