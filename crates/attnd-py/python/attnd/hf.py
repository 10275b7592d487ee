"""transformers' models with attnd's attention: ``attnd.hf.register()``, then ``attn_implementation="attnd"``.

>>> import attnd.hf, torch, transformers
>>> attnd.hf.register()
>>> config = transformers.LlamaConfig(
...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
... )
>>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="attnd").eval()
>>> model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False).shape
torch.Size([1, 7])

Whatever ``eager`` computes is computed, from the same inputs: masks are those that it would get, always explicit, and none is guessed
from a flag. Models that don't ask for an implementation, or whose own attention does something that the interface doesn't tell, are
refused when they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ._hf_cache import Cache
from ._hf_models import NOT_COMPUTED, refuse
from ._hf_rules import rule_of
from ._tensors import attend

if TYPE_CHECKING:
    from ._cluster import Cluster

__all__ = ["Cache", "register"]

NAME = "attnd"

_cluster: Cluster | None = None


def register(*, cluster: Cluster | None = None) -> None:
    """Makes ``attn_implementation="attnd"`` known to transformers. May be called again, for another cluster.

    Args:
        cluster: Where attention is computed; here unless it is said.
    """
    from transformers import AttentionInterface, PreTrainedModel

    global _cluster
    _cluster = cluster
    AttentionInterface.register(NAME, attention_forward)
    try:
        from transformers import AttentionMaskInterface
    except ImportError:
        # Before 4.53 models made the masks of every implementation that they didn't know as those of eager.
        pass
    else:
        AttentionMaskInterface.register(NAME, attention_mask)
    _check_at_load(PreTrainedModel)


def _check_at_load(base: type) -> None:
    """Has every model asked, when its implementation is chosen, whether attnd can be it."""
    for method in ("get_correct_attn_implementation", "_check_and_adjust_attn_implementation"):
        chosen = getattr(base, method, None)
        if chosen is None or getattr(chosen, "_attnd", False):
            continue

        def checked(self, implementation, *args, _chosen=chosen, **kwargs):
            if implementation == NAME:
                refuse(type(self))
            return _chosen(self, implementation, *args, **kwargs)

        checked._attnd = True
        setattr(base, method, checked)


def attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask of a model's layers, ``[batch, 1, queries, keys]``, 0 or the lowest number: that of eager, as some models have layers
    that add it to scores of their own, beside those that ask for an implementation."""
    from transformers.masking_utils import eager_mask

    mask = eager_mask(*args, **kwargs)
    if mask is not None:
        # All layers get it, and what is read of it once is so for all: nobody else has its numbers.
        mask._attnd_read = None
    return mask


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What layers call: ``[batch, heads, tokens, dim]`` in, ``[batch, tokens, heads, dim]`` out, and the weights if they are wanted.

    ``is_causal`` and ``sliding_window`` are hints for implementations that make masks of their own: the mask has both.
    """
    if dropout and module.training:
        raise ValueError(f"dropout is {dropout}, and attnd computes none: model.eval()")
    for name in NOT_COMPUTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} hands over {name}, which attnd doesn't compute: load the model with eager")
    layer = getattr(key, "_attnd_layer", None)
    if layer is not None:
        if position_bias is not None or sinks is not None or output_attentions:
            raise ValueError("attnd.hf.Cache has neither position biases, nor sinks of each query, nor weights that can be put out")
        options = {"scale": scaling, "softcap": softcap}
        if s_aux is not None:
            options["sinks"] = s_aux.detach().float().numpy()
        each = _of_each(attention_mask, query.shape[0], options)
        return layer.cache.step(layer, query, key, value, each).transpose(1, 2).contiguous(), None
    keys = key.shape[2]
    options = {}
    visible, bias = None, position_bias
    if attention_mask is not None:
        read = _read(attention_mask)
        if read.sees_nothing:
            # Of a row of equal lowest scores eager takes the mean of all values.
            options["empty_row"] = "uniform"
        if read.has_numbers:
            visible = read.visible if bias is not None else None
            bias = attention_mask if bias is None else bias + attention_mask.masked_fill(~read.visible, 0.0)
        elif read.rule is not None and position_bias is None and sinks is None:
            options.update(read.rule)
        else:
            visible = read.visible
    if s_aux is not None:
        options["sinks"] = s_aux.detach().float().numpy()
        options.pop("empty_row", None)
    if sinks is not None:
        # A logit of its own for each query: one more key, which is 0, and whose value is.
        key, value = (functional.pad(rows, (0, 0, 0, 1)) for rows in (key, value))
        zeros = query.new_zeros(*query.shape[:3], keys) if bias is None else bias.expand(*query.shape[:3], keys)
        bias = torch.cat([zeros, sinks.to(zeros.dtype)], dim=-1)
        visible = None if visible is None else functional.pad(visible, (0, 1), value=True)
        options.pop("empty_row", None)
    told = attend(
        query,
        key,
        value,
        cluster=_cluster,
        attn_mask=visible,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        return_weights=output_attentions,
        **options,
    )
    weights = None
    if output_attentions:
        weights = torch.from_numpy(told["elements"][0])[..., :keys]
        if options.get("empty_row") == "uniform":
            weights[torch.from_numpy(told["lse"]) == float("-inf")] = 1 / keys
        weights = weights.to(query.dtype)
    return told["context"].transpose(1, 2).contiguous(), weights


def _of_each(mask: torch.Tensor | None, batch: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each element of the batch, whose sessions know of masks what a rule says."""
    rule = {} if mask is None else _read(mask).rule
    if rule is None:
        raise ValueError("attnd.hf.Cache has causal rules, windows and padding, and this mask is none of them: generate without the cache")

    def of_element(value: Any, element: int) -> Any:
        return value[element] if isinstance(value, list) else value

    return [{**options, **{name: of_element(value, b) for name, value in rule.items()}} for b in range(batch)]


@dataclass(frozen=True)
class _Read:
    """What a mask says."""

    #: The mask's own when it was read, which grows with each change; none of a tensor of inference mode.
    version: int | None
    #: Which keys it shows.
    visible: torch.Tensor
    #: Whether it has other numbers than 0 and the lowest one.
    has_numbers: bool
    #: The same as ``visible``, in numbers for which no mask is read.
    rule: dict[str, Any] | None
    #: A row is shown no key.
    sees_nothing: bool


def _read(mask: torch.Tensor) -> _Read:
    version = None if mask.is_inference() else mask._version
    # Masks of others may change in ways that no version tells, and are read each time.
    read = getattr(mask, "_attnd_read", None)
    if read is None or read.version != version:
        visible, has_numbers = mask, False
        if mask.dtype != torch.bool:
            visible = mask > torch.finfo(mask.dtype).min
            has_numbers = bool(mask.masked_fill(~visible, 0.0).any())
        rule = None if has_numbers else rule_of(visible)
        read = _Read(version, visible, has_numbers, rule, not bool(visible.any(-1).all()))
        if version is not None and hasattr(mask, "_attnd_read"):
            mask._attnd_read = read
    return read
