"""`generate()` with the caches that fit: the cached answer is the uncached one."""

from __future__ import annotations

import pytest
import torch
from matrix import DEFAULTS, MODELS, ONE_CASE_EACH, Case, converted_model, left_padded, shake, tiny_model, tokens
from transformers import DynamicCache, GenerationConfig

on_every_model = pytest.mark.parametrize("model", MODELS)
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)
NEW = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
@on_every_model
def test_greedy_with_cache_is_greedy_without(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(2, 17)
    assert torch.equal(net.generate(ids, **NEW), net.generate(ids, use_cache=False, **NEW))


@defaults
@on_every_model
def test_a_left_padded_batch_generates_what_its_rows_do(model: str, case: Case) -> None:
    net = converted_model(model, case)
    rows = [tokens(size, seed=size) for size in (3, 11, 20)]
    ids, mask = left_padded(rows)
    together = net.generate(ids, attention_mask=mask, **NEW)
    for index, row in enumerate(rows):
        alone = net.generate(row[None], **NEW)[0]
        assert torch.equal(together[index, -len(alone) :], alone)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "dynamic"},
    ],
    ids=str,
)
@defaults
@on_every_model
def test_ways_of_generating_agree_with_no_cache(model: str, case: Case, options: dict) -> None:
    net, ids = converted_model(model, case), tokens(2, 14)
    plain = {key: value for key, value in options.items() if key.startswith("num_")}
    expected = net.generate(ids, use_cache=False, **NEW, **plain)
    assert torch.equal(net.generate(ids, **NEW, **options), expected)


@defaults
@on_every_model
def test_assisted_decoding_is_lossless(model: str, case: Case) -> None:
    """Rejected drafts are rolled back exactly, which recurrent states don't offer in transformers itself."""
    net = converted_model(model, case)
    ids = tokens(1, 9).repeat(1, 2)
    expected = net.generate(ids, **NEW)
    assert torch.equal(net.generate(ids, prompt_lookup_num_tokens=3, **NEW), expected)
    assert torch.equal(net.generate(ids, assistant_model=tiny_model(model), **NEW), expected)


@defaults
@on_every_model
def test_mixed_layers_generate(model: str, case: Case) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, layers=[1], **case.options))
    ids, mask = left_padded([tokens(5), tokens(13, seed=1)])
    expected = net.generate(ids, attention_mask=mask, use_cache=False, **NEW)
    assert torch.equal(net.generate(ids, attention_mask=mask, **NEW), expected)
    assert torch.equal(net.generate(ids, attention_mask=mask, past_key_values=DynamicCache(), **NEW), expected)


@defaults
@on_every_model
def test_a_conversation_goes_on_from_its_cache(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 12)
    first = net.generate(ids, return_dict_in_generate=True, **NEW)
    turn = torch.cat((first.sequences, tokens(1, 6, seed=4)), dim=1)
    again = net.generate(turn, past_key_values=first.past_key_values, **NEW)
    assert torch.equal(again, net.generate(turn, **NEW))


@defaults
@on_every_model
def test_a_bare_cache_of_the_user_works(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 12)
    assert torch.equal(net.generate(ids, past_key_values=DynamicCache(), **NEW), net.generate(ids, **NEW))


@defaults
@on_every_model
def test_sampling_is_reproducible(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(2, 12)
    config = GenerationConfig(max_new_tokens=8, do_sample=True, num_return_sequences=2, pad_token_id=0)
    torch.manual_seed(7)
    with_cache = net.generate(ids, generation_config=config)
    torch.manual_seed(7)
    config.use_cache = False
    assert torch.equal(net.generate(ids, generation_config=config), with_cache)
