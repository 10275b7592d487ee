"""Small models with random weights, of every family that transformers has and that can be made from its configuration alone.

Run as a program, it lists what becomes of each.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import transformers

import attnd.hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# What makes a model small, by the names that configurations have for it.
SMALL: dict[str, Any] = {}
for value, names in {
    32: "hidden_size d_model n_embd embed_dim dim embedding_size width encoder_hidden_size decoder_hidden_size text_embed_dim attention_hidden_size "
    "d_embed emb_dim embed_dim_out entity_emb_size proj_codevector_dim word_embed_proj_dim audio_hidden_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads num_encoder_attention_heads "
    "num_decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads num_experts num_local_experts n_routed_experts",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth "
    "num_key_value_heads num_experts_per_tok encoder_num_hidden_layers decoder_num_hidden_layers num_kv_heads depths_per_stage "
    "encoder_num_key_value_heads decoder_num_key_value_heads",
    64: "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim inner_dim moe_intermediate_size "
    "intermediate_dim d_inner feed_forward_hidden_size ffn_hidden_size shared_expert_intermediate_size",
    8: "head_dim d_kv attention_head_size num_mel_bins num_queries",
    99: "vocab_size text_vocab_size",
    64.0: "",
}.items():
    SMALL.update(dict.fromkeys(names.split(), value))
SMALL.update(
    image_size=32, patch_size=8, num_channels=3, max_position_embeddings=64, n_positions=64, max_target_positions=64,
    max_source_positions=32, sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    layerdrop=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, rotary_dim=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, type_vocab_size=2,
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, apply_spec_augment=False, mask_time_prob=0.0,
    spatial_merge_size=2, temporal_patch_size=1, out_hidden_size=32, projection_dim=16, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=99, num_kv_shared_layers=0, num_frames=4, tubelet_size=(2, 8, 8),
)


def small(of: type, depth: int = 0) -> Any:
    """A configuration of few and narrow layers."""
    parameters = inspect.signature(of.__init__).parameters
    known = set(parameters) | set(getattr(of, "__dataclass_fields__", {})) | set(getattr(of, "__annotations__", {}))
    known |= set(getattr(of, "attribute_map", {}))
    chosen = {name: value for name, value in SMALL.items() if name in known}
    for name, inner in (getattr(of, "sub_configs", None) or {}).items():
        if depth < 3 and inner is not transformers.AutoConfig and name in known:
            chosen[name] = small(inner, depth + 1)
    return of(**chosen)


def inputs(model: torch.nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """What its forward takes, with padding where it knows of any."""
    generator = torch.Generator().manual_seed(0)
    forward = inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", None) or config
    main = model.main_input_name
    given: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        vocabulary = min(getattr(text, "vocab_size", 99) or 99, 99)
        given["input_ids"] = torch.randint(3, vocabulary, (2, 11), generator=generator)
        if "attention_mask" in forward:
            given["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
            given["attention_mask"][0, :3] = 0
        if "decoder_input_ids" in forward:
            given["decoder_input_ids"] = torch.randint(3, vocabulary, (2, 7), generator=generator)
            # Encoders and decoders are padded at the end.
            given["attention_mask"][0] = given["attention_mask"][0].flip(0)
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", 32)
        size = size if isinstance(size, (tuple, list)) else (size, size)
        given[main] = torch.randn(2, getattr(vision, "num_channels", 3), *size, generator=generator)
    elif main == "input_values":
        given[main] = torch.randn(2, 4000, generator=generator)
    elif main == "input_features":
        given[main] = torch.randn(2, getattr(config, "num_mel_bins", 8), 64, generator=generator)
        if "decoder_input_ids" in forward:
            given["decoder_input_ids"] = torch.randint(3, 99, (2, 7), generator=generator)
    else:
        raise ValueError(f"its main input is {main}")
    return given


def hidden(output: Any) -> list[torch.Tensor]:
    """The tensors of floats in what a model gives."""
    values = output.values() if hasattr(output, "values") else output
    return [value for value in values if torch.is_tensor(value) and value.is_floating_point()]


def families() -> list[str]:
    return sorted(CONFIG_MAPPING.keys())


def made(family: str, implementation: str) -> tuple[torch.nn.Module, Any]:
    """A model of a family, in evaluation mode. The same weights for the same family."""
    config = small(CONFIG_MAPPING[family])
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                # Scores of some size: of tiny ones neither a cap nor a scale nor a missing product would show.
                layer.weight.normal_(std=1.5 * layer.in_features**-0.5)
    return model, config


def size(family: str) -> int:
    """Parameters of a model of a family, which isn't made for it."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(small(CONFIG_MAPPING[family]))
    return sum(parameter.numel() for parameter in model.parameters())


def compared(family: str) -> dict[str, Any]:
    """What becomes of a family: ``made`` says whether it could be made and run here, ``refused`` why attnd refuses it; ``layers`` is how
    many calls of attention were compared, ``of_layers`` the largest difference of one from eager on the same inputs, relative to its
    largest element, ``of_model`` that of the model's outputs."""
    if size(family) > 30e6:
        return {"made": "its smallest configuration here is large"}
    theirs, config = made(family, "eager")
    given = inputs(theirs, config)
    with torch.no_grad():
        wanted = hidden(theirs(**given))
    if not wanted:
        return {"made": "it gives no floats"}
    try:
        ours, _ = made(family, "attnd")
    except ValueError as refused:
        return {"refused": str(refused)}
    ours.load_state_dict(theirs.state_dict())
    of_layers: list[float] = []

    def both(module, query, key, value, attention_mask, **kwargs):
        output, weights = attnd.hf.attention_forward(module, query, key, value, attention_mask, **kwargs)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        expected, _ = eager(module, query, key, value, attention_mask, **kwargs)
        of_layers.append(apart(output, expected))
        return output, weights

    transformers.AttentionInterface.register("attnd", both)
    try:
        with torch.no_grad():
            got = hidden(ours(**given))
    finally:
        attnd.hf.register()
    assert len(got) == len(wanted)
    of_model = max(apart(one, other) for one, other in zip(got, wanted))
    return {"layers": len(of_layers), "of_layers": max(of_layers, default=0.0), "of_model": of_model}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest element if that is over 1; infinite where one is NaN and the other isn't."""
    assert one.shape == other.shape
    if one.numel() == 0:
        return 0.0
    if not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    attnd.hf.register()
    for name in families():
        try:
            print(name, compared(name), flush=True)
        except Exception as error:  # noqa: BLE001: what can't be made isn't compared, and says why.
            print(name, {"made": f"{type(error).__name__}: {error}"[:160].replace("\n", " ")}, flush=True)
