"""`generate()` with the caches that fit: the cached answer is the uncached one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import VOCABULARY
from matrix import (
    MODELS,
    OF_FOUR_HEADS,
    ONE_CASE_EACH,
    ONE_STATE_EACH,
    Case,
    close,
    converted_model,
    left_padded,
    shake,
    through,
    tiny_config,
    tiny_model,
    tokens,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

on_every_model = pytest.mark.parametrize("model", MODELS)
defaults = pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
NEW = {"max_new_tokens": 9, "do_sample": False}


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


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("case", ONE_STATE_EACH, ids=str)
@on_every_model
def test_ways_of_generating_agree_with_no_cache(model: str, case: Case, options: dict) -> None:
    net, ids = converted_model(model, case), tokens(2, 14)
    plain = {key: value for key, value in options.items() if key.startswith("num_")}
    expected = net.generate(ids, use_cache=False, **NEW, **plain)
    assert torch.equal(net.generate(ids, **NEW, **options), expected)


@pytest.mark.parametrize("case", ONE_STATE_EACH, ids=str)
@on_every_model
def test_assisted_decoding_is_lossless(model: str, case: Case) -> None:
    """Rejected drafts are rolled back exactly, which recurrent states don't offer in transformers itself."""
    net = converted_model(model, case)
    ids = tokens(1, 9).repeat(1, 2)
    expected = net.generate(ids, **NEW)
    assert torch.equal(net.generate(ids, prompt_lookup_num_tokens=3, **NEW), expected)
    assert torch.equal(net.generate(ids, assistant_model=tiny_model(model), **NEW), expected)
    assert torch.equal(
        tiny_model(model).generate(ids, assistant_model=net, **NEW), tiny_model(model).generate(ids, **NEW)
    )


@pytest.mark.parametrize("layers", [[0], [1]], ids=["first", "last"])
@defaults
@on_every_model
def test_mixed_layers_generate(model: str, case: Case, layers: list[int]) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, layers=layers, **case.options))
    ids, mask = left_padded([tokens(5), tokens(13, seed=1)])
    expected = net.generate(ids, attention_mask=mask, use_cache=False, **NEW)
    assert torch.equal(net.generate(ids, attention_mask=mask, **NEW), expected)
    assert torch.equal(net.generate(ids, attention_mask=mask, **through(DynamicCache()), **NEW), expected)
    drafts = tokens(1, 9).repeat(1, 2)
    expected = net.generate(drafts, use_cache=False, **NEW)
    for options in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model(model)},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
    ):
        assert torch.equal(net.generate(drafts, **NEW, **options), expected), options


@defaults
@on_every_model
def test_a_conversation_goes_on_from_its_cache(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 12)
    first = net.generate(ids, return_dict_in_generate=True, **NEW)
    turn = torch.cat((first.sequences, tokens(1, 6, seed=4)), dim=1)
    again = net.generate(turn, **through(first.past_key_values), **NEW)
    assert torch.equal(again, net.generate(turn, **NEW))


@defaults
@on_every_model
def test_a_bare_cache_of_the_user_works(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 12)
    expected = net.generate(ids, **NEW)
    assert torch.equal(net.generate(ids, **through(DynamicCache()), **NEW), expected)
    assert torch.equal(net.generate(ids, cache_implementation="dynamic", **NEW), expected)


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


@defaults
@on_every_model
def test_embeddings_streamers_and_guidance(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 12)
    expected = net.generate(ids, **NEW)
    embedded = net.get_input_embeddings()(ids)
    assert torch.equal(net.generate(inputs_embeds=embedded, **NEW), expected[:, 12:])
    streamed: list[int] = []

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None:
            streamed.append(-1)

    net.generate(ids, streamer=Streamer(), **NEW)
    assert streamed == [*expected[0].tolist(), -1]
    guided = {"guidance_scale": 1.5, "negative_prompt_ids": tokens(1, 7, seed=8), **NEW}
    assert torch.equal(net.generate(ids, **guided), net.generate(ids, use_cache=False, **guided))


@defaults
@on_every_model
def test_the_pipeline_takes_a_converted_folder(model: str, case: Case, tmp_path: Path) -> None:
    net = converted_model(model, case)
    net.save_pretrained(tmp_path)
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left").save_pretrained(tmp_path)
    generate = pipeline("text-generation", str(tmp_path))
    prompts = ["w5 w6 w7", "w9 w10 w11 w12 w13 w14 w15 w16 w17"]
    together = generate(prompts, batch_size=2, return_full_text=False, **NEW)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
        new = net.generate(ids, **NEW)[0, ids.shape[1] :]
        assert answer[0]["generated_text"].split() == [f"w{int(index)}" for index in new]


@defaults
@on_every_model
def test_an_offloaded_cache_of_converted_layers_stays_on_the_device(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 12)
    cache = DynamicCache(config=net.config)
    cache.offloading = True  # what cache_implementation="offloaded" sets, where there is an accelerator
    assert torch.equal(net.generate(ids, **through(cache), **NEW), net.generate(ids, **NEW))


@defaults
@on_every_model
def test_caches_that_cannot_hold_a_state_are_refused(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 12)
    with pytest.raises((ValueError, ImportError), match="effattn|quanto|hqq"):
        net.generate(ids, cache_implementation="quantized", **NEW)
    refusals = 'not supported for continuous batching|"paged.hf_effattn"` is not supported'  # the second before 5.19
    with pytest.raises(ValueError, match=refusals):
        net.generate_batch([ids[0].tolist()], generation_config=GenerationConfig(**NEW))


@pytest.mark.parametrize("case", [case for case in ONE_CASE_EACH if case.name != "vertical_slash"], ids=str)
@on_every_model
def test_a_conversation_begun_before_the_conversion_goes_on(model: str, case: Case) -> None:
    """The first layer's keys don't depend on attention, so a model of one layer tells what its state must be."""
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(tiny_config(model, num_hidden_layers=1)).eval()
    ids, cache = tokens(2, 24), DynamicCache()
    with torch.no_grad():
        net(ids[:, :17], **through(cache))
        shake(net.convert_attention(case.mechanism, **case.options))
        if any(getattr(m, "undo_rotary", None) or getattr(m, "num_gates", 0) for m in net.modules()):
            with pytest.raises(ValueError, match="keys after rotary only"):
                net(ids[:, 17:18], **through(cache))
            return
        parts = [net(ids[:, a:b], **through(cache)).logits for a, b in ((17, 18), (18, 23), (23, 24))]
        close(torch.cat(parts, dim=1), net(ids, use_cache=False).logits[:, 17:])
