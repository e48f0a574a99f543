"""Places where transformers does more with a model than call it, and where conversions by others have gone wrong."""

from __future__ import annotations

import copy
import sys

import families
import pytest
import torch
from matrix import (
    DEFAULTS,
    MODELS,
    Case,
    close,
    converted_model,
    left_padded,
    positions_of,
    shake,
    through,
    tiny_model,
    tokens,
)
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, EncoderDecoderCache
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from hf_effattn.cache import EffAttnCacheLayer

on_every_model = pytest.mark.parametrize("model", MODELS)
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)


@defaults
@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "mistral"])
def test_layers_with_a_window_of_their_own_convert_when_asked(family: str, case: Case) -> None:
    """One of two layers with a native window: its masks are cut to that window, which the conversion replaces."""
    torch.manual_seed(0)
    config = families.tiny_config(family, sliding_window=5)
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * 2
    net = AutoModelForCausalLM.from_config(config).eval()
    dense = copy.deepcopy(net)
    shake(net.convert_attention(case.mechanism, layers=[0], **case.options))
    rows = [tokens(8), tokens(19, seed=1)]
    ids, mask = left_padded(rows)
    positions, cache = positions_of(mask), DynamicCache(config=net.config)
    with torch.no_grad():
        parts = [
            net(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], **through(cache)).logits
            for a, b in ((0, 7), (7, 13), (13, 14), (14, 19))
        ]
        for index, row in enumerate(rows):
            alone = net(row[None], use_cache=False).logits[0]
            close(torch.cat(parts, dim=1)[index, -len(row) :], alone)
            assert not torch.allclose(alone, dense(row[None], use_cache=False).logits[0], atol=1e-4)
        wide = dense.convert_attention("sparse", window=100, layers=[0, 1])
        no_window = AutoModelForCausalLM.from_config(families.tiny_config(family, sliding_window=100)).eval()
        no_window.load_state_dict(wide.state_dict())
        if family == "mistral":  # the others place tokens of windowed layers by another rotary
            close(wide(rows[1][None]).logits, no_window(rows[1][None]).logits)


@defaults
@on_every_model
def test_a_single_padded_token_leaves_its_row_as_it_was(model: str, case: Case) -> None:
    net, ids, more = converted_model(model, case), tokens(2, 12), tokens(2, 2, seed=1)
    cache = DynamicCache(config=net.config)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, 12] = 0
    positions = positions_of(mask)
    with torch.no_grad():
        net(ids, **through(cache))
        for t in (12, 13):
            step = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
            logits = net(more[:, t - 12 : t - 11], **through(cache), **step).logits[:, -1]
        close(logits[0], net(torch.cat((ids[0], more[0, 1:]))[None], use_cache=False).logits[0, -1])
        close(logits[1], net(torch.cat((ids[1], more[1]))[None], use_cache=False).logits[0, -1])


@defaults
@on_every_model
def test_a_cache_for_encoders_is_refused(model: str, case: Case) -> None:
    with pytest.raises(TypeError, match="got EncoderDecoderCache"):
        converted_model(model, case)(tokens(1, 4), **through(EncoderDecoderCache(DynamicCache(), DynamicCache())))


@defaults
@on_every_model
def test_recording_asked_of_a_bare_cache_too_early_is_not_lost_silently(model: str, case: Case) -> None:
    """A `DynamicCache()` without config has no layers yet that could take note."""
    cache = DynamicCache()
    cache.activate_past_recording()
    converted_model(model, case)(tokens(1, 8), **through(cache))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)


def test_attention_that_runs_twice_a_layer_is_noticed() -> None:
    layer = EffAttnCacheLayer()
    layer.bind("owner")
    keys = torch.zeros(1, 2, 3, 4)
    layer.update(keys, keys)
    layer.claim(3)
    with pytest.raises(ValueError, match="runs twice a layer"):
        layer.claim(3)
    with pytest.raises(ValueError, match="not converted"):
        layer.update(keys, keys)


@defaults
@on_every_model
def test_what_transformers_asks_of_a_class_stays_answered(model: str, case: Case) -> None:
    native, net = tiny_model(model), converted_model(model, case)
    assert type(native).__name__ in type(net).__name__  # generate decides some things by the name
    # `transformers serve` looks a folder's class up there, and imports it anew:
    assert getattr(sys.modules["transformers"], type(net).__name__) is type(net)
    splits = getattr(net, "supports_context_parallel", net._supports_context_parallel)  # 5.16 has the latter only
    assert not splits, "a state cannot be split along the text"
    assert type(net)._can_set_attn_implementation() == type(native)._can_set_attn_implementation()
    for module in net.modules():
        if hasattr(module, "_can_record_outputs"):
            assert _CAN_RECORD_REGISTRY[str(type(module))] == module._can_record_outputs
    assert getattr(net.config, "layer_types", None) == getattr(native.config, "layer_types", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_every_model
def test_new_parameters_come_in_the_dtype_of_the_model(model: str, dtype: torch.dtype) -> None:
    """FSDP flattens a block into one tensor, so parameters of a block share a dtype."""
    net = tiny_model(model).to(dtype).convert_attention("linear")
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_continuous_batching_of_a_partly_converted_model_reports_an_error() -> None:
    net = tiny_model("gpt2").convert_attention("linear", layers=[1])
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)  # else much memory, for a long time
    answer = net.generate_batch([tokens(9).tolist()], max_new_tokens=4, continuous_batching_config=small)
    assert all("converted layers" in result.error for result in answer.values())
