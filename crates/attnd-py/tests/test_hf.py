"""transformers' models with attnd's attention: the same as eager, or refused when they are made."""

from __future__ import annotations

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import transformers

import attnd.hf
import families

# Families that are made and compared here with the version of transformers that the tests have; FAMILIES.md lists them.
LEAST = 207
# Their models choose by largest scores, which may change with the last bit: of these only layers are held against eager.
CHOOSES = {"deimv2"}


@pytest.fixture(autouse=True)
def registered():
    transformers.logging.set_verbosity_error()
    attnd.hf.register()


def test_every_family_agrees_with_eager_or_is_refused():
    agree, refused, apart = [], [], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in families.families():
            try:
                found = families.compared(family)
            except Exception:  # noqa: BLE001: can't be made from its configuration alone, or takes other inputs.
                continue
            if "refused" in found:
                refused.append(family)
                assert "not supported, load it with" in found["refused"], found
            elif found.get("layers"):
                agree.append(family)
                # Of f32 scores of some tens, whose rounding both have: the largest seen is 1.1e-5, where scores aren't scaled down.
                if found["of_layers"] > 3e-5 or (found["of_model"] > 2e-5 and family not in CHOOSES):
                    apart[family] = found
    assert not apart, apart
    assert len(agree) >= LEAST, (len(agree), agree)
    # One that computes everything itself, one that does so in some layers, one with a table of its own, one with more than the interface.
    assert {"bloom", "xlnet", "sam_vision_model", "hy_v4"} <= set(refused), refused


def tiny(implementation, **changed):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, pad_token_id=0, **{**sizes, **changed})
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def test_weights_are_eagers():
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    got, wanted = (
        tiny(name)(ids, attention_mask=padding, output_attentions=True).attentions for name in ("attnd", "eager")
    )
    assert len(got) == 2
    for ours, theirs in zip(got, wanted):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert tiny("attnd")(ids).attentions is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "gpt_oss", "mistral", "t5", "bart"])
def test_the_same_text_comes_out(family):
    of = transformers.AutoModelForSeq2SeqLM if family in ("t5", "bart") else transformers.AutoModelForCausalLM
    texts = []
    for implementation in ("eager", "attnd"):
        config = families.small(transformers.models.auto.configuration_auto.CONFIG_MAPPING[family])
        torch.manual_seed(0)
        model = of.from_config(config, attn_implementation=implementation).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
        ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))
        padding = torch.ones_like(ids)
        padding[1, :4] = 0
        model.generation_config.decoder_start_token_id = 1
        texts.append(model.generate(ids, attention_mask=padding, max_new_tokens=30, min_new_tokens=30, do_sample=False))
    assert torch.equal(*texts)
    assert len(texts[0].unique()) > 5


def test_inference_mode_and_masks_that_change(cluster):
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))
    model = tiny("attnd")
    with torch.no_grad():
        wanted = model(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, wanted)
    rows = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 5, 5)
    for hidden in (4, 3):
        # In place: what was read of it before is not so any more.
        mask[..., hidden] = torch.finfo(torch.float32).min
        got, _ = attnd.hf.attention_forward(model, rows, rows, rows, mask)
        seen = rows[:, :, :hidden]
        wanted = torch.nn.functional.scaled_dot_product_attention(rows, seen, seen).transpose(1, 2)
        assert torch.allclose(got, wanted, atol=1e-6)


def test_masks_are_forgotten_with_their_owners():
    rows = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    made = [
        lambda: torch.ones(1, 1, 5, 5, dtype=torch.bool),
        lambda: torch.randn(1, 1, 5, 5),
        lambda: attnd.hf.attention_mask(1, 5, 5),
    ]
    for make in made:
        masks = [make() for _ in range(20)]
        for mask in masks:
            attnd.hf.attention_forward(torch.nn.Identity(), rows, rows, rows, mask)
        alive = [weakref.ref(mask) for mask in masks]
        del masks, mask
        gc.collect()
        assert not any(one() is not None for one in alive)


def test_changes_that_no_version_tells_are_seen():
    rows = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    numbers = np.zeros((1, 1, 5, 5), np.float32)
    mask = torch.from_numpy(numbers)
    before, _ = attnd.hf.attention_forward(torch.nn.Identity(), rows, rows, rows, mask)
    numbers[..., 2:] = np.finfo(np.float32).min
    after, _ = attnd.hf.attention_forward(torch.nn.Identity(), rows, rows, rows, mask)
    fresh, _ = attnd.hf.attention_forward(torch.nn.Identity(), rows, rows, rows, mask.clone())
    assert torch.equal(after, fresh) and not torch.equal(before, after)


def test_a_mask_of_one_is_for_the_batch():
    rows = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., :2] = torch.finfo(torch.float32).min
    got, _ = attnd.hf.attention_forward(torch.nn.Identity(), rows, rows, rows, mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(rows, rows[:, :, 2:], rows[:, :, 2:])
    assert torch.allclose(got, wanted.transpose(1, 2), atol=1e-6)


@torch.no_grad()
def test_a_cluster_gives_the_same_bits(cluster):
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    model = tiny("attnd")
    here = model(ids).logits
    attnd.hf.register(cluster=cluster)
    try:
        assert torch.equal(model(ids).logits, here)
    finally:
        attnd.hf.register()


def test_what_is_not_computed_is_refused():
    model = tiny("attnd", attention_dropout=0.5).train()
    with pytest.raises(ValueError, match="dropout is 0.5"), torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="no_grad"):
        tiny("attnd")(torch.ones(1, 3, dtype=torch.long))
    model = tiny("eager")
    model.set_attn_implementation("attnd")
    assert model.config._attn_implementation == "attnd"
    with pytest.raises(ValueError, match="hands over indices"):
        attnd.hf.attention_forward(model, *(torch.ones(1, 1, 1, 1),) * 3, None, indices=torch.ones(1))


def random_mask(generator, kind, batch, queries, keys):
    """A mask as models have them, and as they don't."""
    position = torch.arange(queries)[:, None] + keys - queries
    column = torch.arange(keys)
    mask = torch.ones(batch, queries, keys, dtype=torch.bool)
    if "causal" in kind:
        mask &= column <= position
    if "window" in kind:
        mask &= column > position - 5
    if "left" in kind:
        mask &= column >= torch.randint(keys // 2 + 1, (batch, 1, 1), generator=generator)
    if "right" in kind:
        mask &= column < torch.randint(keys // 2 + 1, keys + 1, (batch, 1, 1), generator=generator)
    if "noise" in kind:
        mask &= torch.rand(mask.shape, generator=generator) < 0.8
    return mask[:, None]


def test_rules_hide_what_their_masks_hide():
    generator = torch.Generator().manual_seed(5)
    found = 0
    kinds = ["", "causal", "causal window", "causal left", "causal right", "left", "right", "left right", "causal window left", "noise", "window"]
    for kind in kinds:
        for queries, keys in [(1, 1), (1, 9), (9, 9), (4, 30), (30, 30)]:
            mask = random_mask(generator, kind, 3, queries, keys)
            rule = attnd.hf.rule_of(mask)
            if rule is None:
                continue
            found += 1
            q = torch.randn(3, 2, queries, 8, generator=generator).numpy()
            k = torch.randn(3, 2, keys, 8, generator=generator).numpy()
            by_rule, by_mask = (attnd.attention(q, k, k, return_lse=True, **options) for options in (rule, {"attn_mask": mask.numpy()}))
            for one, other in zip(by_rule, by_mask):
                assert (one == other).all() or abs(one - other)[one != other].max() < 1e-6, (kind, queries, keys, rule)
            # Whatever isn't hidden by both has the same keys: an lse tells each.
            assert ((by_rule[1] == -float("inf")) == (by_mask[1] == -float("inf"))).all()
    assert found >= 35, found
    assert attnd.hf.rule_of(random_mask(generator, "noise", 1, 9, 9)) is None
