"""Which of transformers' models compute what the attention interface tells, and nothing else."""

from __future__ import annotations

# By the module that defines the model: what its own attention does beside what it hands over.
_OWN: dict[str, str] = {}


def refuse(model: type) -> None:
    """Raises for a class of models whose attention attnd can't be.

    Raises:
        ValueError: With the reason.
    """
    name = model.__module__.rsplit(".", 1)[-1].removeprefix("modeling_")
    reason = _OWN.get(name)
    if reason is None and not _asks(model):
        reason = "computes its attention itself and never asks for an implementation"
    if reason is not None:
        raise ValueError(f'{model.__name__} {reason}: attn_implementation="attnd" is not supported, load it with "eager"')


def _asks(model: type) -> bool:
    """Whether the model's own layers ask transformers' attention interface; a model without layers of its own leaves that to its parts."""
    can_set = getattr(model, "_can_set_attn_implementation", None)
    return True if can_set is None else bool(can_set())
