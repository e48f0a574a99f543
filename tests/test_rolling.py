"""Rolling positions: against the definition, every way of computing gives one answer, and streams have no end."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from matrix import left_padded, positions_of, through, tiny_model, tokens
from test_ops_linear import relative
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_effattn import SparseConfig

WINDOW, SINKS = 7, 3
OPTIONS: dict[str, Any] = {"window": WINDOW, "num_sinks": SINKS, "position_mode": "rolling"}


def rolling(net: PreTrainedModel) -> PreTrainedModel:
    return net.convert_attention("sparse", **OPTIONS)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt_neox", "stablelm"])
@torch.no_grad()
def test_positions_are_those_within_the_cache(family: str) -> None:
    """Keys of a first layer don't depend on attention, so what one layer says of a token is what the dense layer says
    of the tokens that are left, at positions counted from 0."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(families.tiny_config(family, num_hidden_layers=1)).eval()
    ids = tokens(2, 40)
    found = []
    for at in range(40):
        kept = [place for place in range(at + 1) if place < SINKS or at - place < WINDOW]
        found.append(dense(ids[:, kept], position_ids=torch.arange(len(kept))[None]).logits[:, -1:])
    expected = torch.cat(found, dim=1)
    net = rolling(dense)
    torch.testing.assert_close(net(ids).logits, expected, atol=1e-5, rtol=1e-5)
    cache = DynamicCache(config=net.config)
    parts = [net(ids[:, t : t + 1], **through(cache)).logits for t in range(40)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_answer() -> None:
    net, ids = rolling(tiny_model("llama-gqa")), tokens(2, 50)
    full = net(ids, use_cache=False).logits
    absolute = tiny_model("llama-gqa").convert_attention("sparse", window=WINDOW, num_sinks=SINKS)
    assert (full - absolute(ids).logits).abs().max() > 1e-3
    for cuts in ((0, 1, 2, 3, 9, 10, 11, 12, 40, 41, 50), (0, 30, 31, 50)):
        cache = DynamicCache(config=net.config)
        parts = [net(ids[:, a:b], **through(cache)).logits for a, b in zip(cuts, cuts[1:], strict=False)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)
    rows = [tokens(length, seed=length) for length in (50, 8, 23)]
    padded, mask = left_padded(rows)
    logits = net(padded, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
    for index, row in enumerate(rows):
        alone = net(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[index, -len(row) :], alone, atol=1e-5, rtol=1e-5)
    packed = torch.cat(rows)[None]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    together = net(packed, position_ids=places, use_cache=False).logits[0]
    for row, part in zip(rows, together.split([len(row) for row in rows]), strict=True):
        torch.testing.assert_close(part, net(row[None], use_cache=False).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_are_rolled_back_and_generation_continues_after_loading(tmp_path: Any) -> None:
    net, ids = rolling(tiny_model("llama-gqa")), tokens(1, 30)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    greedy = net.generate(ids, **options)
    assert torch.equal(net.generate(ids, use_cache=False, **options), greedy)
    assert torch.equal(net.generate(ids, prompt_lookup_num_tokens=3, **options), greedy)
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(ids, **options), greedy)
    assert "rolling" in str(again.attention_report())


def test_gradients_are_finite_and_bfloat16_works() -> None:
    net, ids = rolling(tiny_model("llama-gqa")), tokens(2, 60)
    net(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net = net.bfloat16()
    cache = DynamicCache(config=net.config)
    with torch.no_grad():
        full = net(ids, use_cache=False).logits
        parts = [net(ids[:, t : t + 1], **through(cache)).logits for t in range(60)]
    assert relative(torch.cat(parts, dim=1), full) <= 1e-2


@torch.no_grad()
def test_a_stream_is_endless_and_its_cache_is_not() -> None:
    net = rolling(tiny_model("llama-gqa"))
    cache, sizes = DynamicCache(config=net.config), set()
    for start in range(0, 20_000, 1_000):
        logits = net(tokens(1, 1_000, seed=start), **through(cache), logits_to_keep=1).logits
        assert logits.isfinite().all()
        sizes.add(sum(layer.nbytes() for layer in cache.layers))
    assert sizes == {net.attention_report(context_length=20_000).cache_bytes}


def test_what_does_not_work_says_so() -> None:
    for options, message in (
        ({"window": 8, "position_mode": "relative"}, "unknown position_mode 'relative'; valid: absolute, rolling"),
        ({"pattern": "strided", "stride": 4, "position_mode": "rolling"}, "is for windows with sinks; strided"),
        ({"window": 8, "num_sinks": 0, "position_mode": "rolling"}, "is for windows with sinks"),
        ({"window": 8, "backend": "masked", "position_mode": "rolling"}, "valid: auto, banded"),
        ({"selector": "quest", "position_mode": "rolling"}, "position_mode does not go with selector 'quest'"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseConfig(**options)
    net = tiny_model("gpt2")
    with pytest.raises(ValueError, match="rolling positions need one kind of rotary positions"):
        rolling(net)
    assert not any(hasattr(module, "effattn") for module in net.modules())
    scaled = families.tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="depend on the length"):
        rolling(AutoModelForCausalLM.from_config(scaled))
