"""Which of transformers' models compute what the attention interface tells, and nothing else."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import lru_cache
from types import ModuleType

# What layers may hand over beside the operands, and eager's functions may read of their layer: all that these change is computed.
_COMPUTED = {"attention_mask", "scaling", "dropout", "position_bias", "softcap", "sinks", "s_aux", "sliding_window"}
_OPERANDS = {"module", "query", "key", "value"}
_READ = {"num_key_value_groups", "training", "head_dim", "sinks"}
# What changes what is computed, where a layer hands it over.
NOT_COMPUTED = ("indices", "head_mask", "layer_head_mask")


def refuse(model: type) -> None:
    """Raises for a class of models whose attention attnd can't be.

    Raises:
        ValueError: With the reason.
    """
    reason = None
    if (module := sys.modules.get(model.__module__)) is not None:
        reason = _does_more(module)
    if reason is None and not _asks(model):
        reason = "computes its attention itself and never asks for an implementation"
    if reason is not None:
        raise ValueError(f'{model.__name__} {reason}: attn_implementation="attnd" is not supported, load it with "eager"')


def _asks(model: type) -> bool:
    """Whether the model's own layers ask transformers' attention interface; a model without layers of its own leaves that to its parts."""
    can_set = getattr(model, "_can_set_attn_implementation", None)
    return True if can_set is None else bool(can_set())


@lru_cache(maxsize=None)
def _does_more(module: ModuleType) -> str | None:
    """What the attention of a module's models is beside what attnd computes: read in eager's own function, which defines it."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return None
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "eager_attention_forward":
            taken = {argument.arg for argument in node.args.args + node.args.kwonlyargs}
            if more := sorted(taken - _COMPUTED - _OPERANDS):
                return f"has an attention of its own, with {', '.join(more)}"
            read = {
                of.attr
                for of in ast.walk(node)
                if isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == "module"
            }
            if more := sorted(read - _READ):
                return f"has an attention of its own, with {', '.join(more)} of its layers"
            if "sinks" in read and "s_aux" not in source:
                return "has sinks that it doesn't hand over"
        if isinstance(node, ast.Subscript) and "_attn_implementation" in ast.unparse(node.slice):
            return f"chooses among implementations of its own, {ast.unparse(node.value)}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attention_interface":
            handed = {keyword.arg for keyword in node.keywords}
            if more := sorted(handed.intersection(NOT_COMPUTED)):
                return f"hands over {', '.join(more)}, which attnd doesn't compute"
    return None
