"""Law 9: what cannot be honoured is an error that says what can, and the model is then as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY
from matrix import DEFAULTS, MODELS, OF_FOUR_HEADS, Case, converted_model, through, tiny_config, tiny_model, tokens
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_effattn
from hf_effattn import LinearConfig
from hf_effattn.patterns import Pattern, sliding_window

on_every_model = pytest.mark.parametrize("model", MODELS)
defaults = pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
IDS = tokens(2, 20)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("quadratic",), {}, ValueError, "unknown mechanism 'quadratic'; valid: linear, sparse"),
        ((None,), {}, TypeError, "mechanism is chosen by its name"),
        (("linear",), {"featuremap": "elu"}, ValueError, "unknown option 'featuremap'.*feature_map"),
        (("linear",), {"feature_map": "gelu"}, ValueError, "valid: cosformer, dpfp, elu"),
        (("linear",), {"window": -1}, ValueError, "window must be at least 0"),
        (("linear",), {"window": 4.0}, TypeError, "window must be an integer"),
        (("linear",), {"window": 0, "num_sinks": 4}, ValueError, "num_sinks=4 needs a softmax window"),
        (("linear",), {"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        (("linear",), {"backend": "fused"}, ValueError, "valid: auto, chunked, reference, triton"),
        (("linear",), {"backend": "triton"}, ValueError, "no softmax window.*valid: auto, chunked, reference"),
        (
            ("linear",),
            {"backend": "triton", "window": 0, "recurrence": "delta"},
            ValueError,
            "no delta rule, as of 'delta'; valid: auto, chunked, reference",
        ),
        (("linear",), {"pattern": "streaming"}, ValueError, "unknown option 'pattern' of linear"),
        (("sparse",), {}, ValueError, r"'streaming' needs \['window'\]"),
        (("sparse",), {"pattern": "butterfly"}, ValueError, "valid: bigbird, dilated, fixed, .*strided"),
        (("sparse",), {"window": 8, "stride": 2}, ValueError, r"does not take \['stride'\].*window, num_sinks"),
        (("sparse",), {"window": 0}, ValueError, "window must be at least 1"),
        (
            ("sparse",),
            {"pattern": "strided", "stride": 4, "backend": "banded"},
            ValueError,
            "'banded' computes windows",
        ),
        (("sparse",), {"window": 8, "backend": "fast"}, ValueError, "valid: auto, banded, gathered, flex, masked"),
        (("sparse",), {"pattern": sliding_window(4), "window": 8}, ValueError, "belong to named patterns"),
        (("sparse",), {"pattern": 7}, TypeError, "must be a Pattern or one of"),
        (("sparse",), {"pattern": Pattern(lambda b, h, q, k: k == q)}, ValueError, "register_pattern"),
        ((LinearConfig(),), {"window": 8}, ValueError, "cannot be joined to a config"),
        (("linear",), {"layers": [2]}, ValueError, "layers names layer 2; valid: 0 to 1"),
        (("linear",), {"layers": [-3]}, ValueError, "layers names layer -3"),
        (("linear",), {"layers": 1}, TypeError, "list of layer indices"),
        (("linear",), {"layers": ["0"]}, TypeError, "list of layer indices"),
        (("linear",), {"keep_softmax": [9]}, ValueError, "keep_softmax names layer 9"),
        (("linear",), {"layers": [0], "keep_softmax": [1]}, ValueError, "not both"),
        (("linear",), {"layers": []}, ValueError, "no layer is left to convert"),
        (("linear",), {"keep_softmax": range(2)}, ValueError, "no layer is left to convert"),
        (("linear",), {"layers": [True]}, TypeError, "list of layer indices"),
        (("sparse",), {"pattern": Pattern(lambda b, h, q, k: k == q) | sliding_window(4)}, ValueError, "made by hand"),
    ],
)
@on_every_model
def test_bad_options_are_named_and_change_nothing(
    model: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = tiny_model(model)
    before, kind, config = net(IDS).logits, type(net), net.config.to_dict()
    with pytest.raises(error, match=message):
        net.convert_attention(*arguments, **options)
    assert type(net) is kind
    assert net.config.to_dict() == config
    assert not any(hasattr(module, "effattn") for module in net.modules())
    assert torch.equal(net(IDS).logits, before)


def test_families_without_a_seam_and_encoders_are_refused() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="no causal self-attention in BertModel of .*; models that only encode"):
        BertModel(BertConfig(**small, vocab_size=9)).convert_attention("linear")
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9))
    with pytest.raises(ValueError, match="type 't5' are not supported. Supported model types: afmoe, .*llama"):
        t5.convert_attention("linear")
    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 9}
    with pytest.raises(ValueError, match="is_encoder_decoder=True"):
        BartModel(BartConfig(**bart, **heads)).convert_attention("linear")
    with pytest.raises(TypeError, match="PreTrainedModel; got Linear"):
        hf_effattn.convert_attention(torch.nn.Linear(2, 2), "linear")  # type: ignore[type-var]


def test_cross_attention_is_refused() -> None:
    net = AutoModelForCausalLM.from_config(tiny_config("gpt2", add_cross_attention=True))
    with pytest.raises(ValueError, match="cross-attention"):
        net.convert_attention("linear")
    assert not hasattr(net.config, "effattn")


@on_every_model
def test_offloaded_models_are_refused(model: str) -> None:
    from accelerate import cpu_offload

    net = tiny_model(model)
    kind = type(net)
    cpu_offload(net)
    with pytest.raises(ValueError, match="offloaded by accelerate.*before dispatching"):
        net.convert_attention("linear")
    assert type(net) is kind


@defaults
@on_every_model
def test_foreign_caches_are_refused(model: str, case: Case) -> None:
    net, plain = converted_model(model, case), tiny_model(model)
    static = StaticCache(config=plain.config, max_cache_len=32)
    plain(IDS, **through(static))
    with pytest.raises(ValueError, match="StaticLayer with 20 tokens.*Pass no cache, a DynamicCache"):
        net(IDS[:, :1], **through(static))
    own = DynamicCache()
    net(IDS, **through(own))
    with pytest.raises(ValueError, match="not converted"):
        plain(IDS[:, :1], **through(own))
    with pytest.raises((TypeError, AttributeError, ValueError)):
        net(IDS, **through(((torch.zeros(1),),)))


@pytest.mark.parametrize("layers", [[1], None], ids=["mixed", "all"])
@defaults
@on_every_model
def test_padding_in_a_cache_of_softmax_layers_is_refused(model: str, case: Case, layers: list[int] | None) -> None:
    """Its keys do not say which of them are padding."""
    cache, mask = DynamicCache(), torch.ones(2, 21, dtype=torch.long)
    mask[0, :3] = 0
    tiny_model(model)(IDS, attention_mask=mask[:, :20], **through(cache))
    net = tiny_model(model).convert_attention(case.mechanism, layers=layers, **case.options)
    with pytest.raises(ValueError, match="20 tokens of softmax attention with padding among them"):
        net(IDS[:, :1], attention_mask=mask, **through(cache))


@on_every_model
def test_a_cache_of_another_mechanism_is_refused(model: str) -> None:
    cache = DynamicCache()
    converted_model(model, DEFAULTS[0])(IDS, **through(cache))
    with pytest.raises(ValueError, match="filled by a layer with linear hedgehog.*now has sparse"):
        converted_model(model, DEFAULTS[2])(IDS[:, :1], **through(cache))


@defaults
@on_every_model
def test_masks_that_differ_by_head_and_custom_masks_are_refused(model: str, case: Case) -> None:
    net = converted_model(model, case)
    heads = torch.ones(2, 4, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="differs by head"):
        net(IDS, attention_mask=heads, use_cache=False)
    tree = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    tree[:, :, 10, 3] = False
    with pytest.raises(ValueError, match="custom 4-D attention masks"):
        net(IDS, attention_mask=tree, use_cache=False)
    bias = torch.zeros(2, 1, 20, 20).masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), torch.finfo().min)
    torch.testing.assert_close(net(IDS, attention_mask=bias, use_cache=False).logits, net(IDS, use_cache=False).logits)
    with pytest.raises(ValueError, match="fits neither the 20 new tokens"):
        net(IDS, attention_mask=bias[:, :, -1:], use_cache=False)
    with pytest.raises(ValueError, match="biases are not supported"):
        net(IDS, attention_mask=bias + 0.5, use_cache=False)


@defaults
@on_every_model
def test_attention_weights_over_a_past_are_refused(model: str, case: Case) -> None:
    """Without a past they exist, and give the same output."""
    net = converted_model(model, case)
    cache = DynamicCache(config=net.config)
    with_weights = net(IDS, **through(cache), output_attentions=True)
    torch.testing.assert_close(with_weights.logits, net(IDS).logits, atol=1e-5, rtol=1e-5)
    assert all(weights.shape == (2, 4, 20, 20) for weights in with_weights.attentions)
    assert all((weights.triu(1) == 0).all() for weights in with_weights.attentions)
    with pytest.raises(ValueError, match="output_attentions=True was given while 20 tokens"):
        net(IDS[:, :1], **through(cache), output_attentions=True)


@defaults
@on_every_model
def test_hidden_states_are_still_recorded(model: str, case: Case) -> None:
    assert len(converted_model(model, case)(IDS, output_hidden_states=True).hidden_states) == 3


@defaults
@on_every_model
def test_unknown_keywords_do_not_pass_silently(model: str, case: Case) -> None:
    for name in ("softcap", "s_aux", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=name):
            converted_model(model, case)(IDS, use_cache=False, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match="is_causal=False"):
        converted_model(model, case)(IDS, use_cache=False, is_causal=False)


@defaults
@on_every_model
def test_packed_documents_cannot_share_a_cache(model: str, case: Case) -> None:
    for first in (8, 1):
        positions = torch.cat((torch.arange(first), torch.arange(20 - first)))[None].expand(2, -1)
        with pytest.raises(ValueError, match="use_cache=False"):
            converted_model(model, case)(IDS, position_ids=positions, use_cache=True)


@defaults
@on_every_model
def test_a_mask_that_forgets_the_past_is_refused(model: str, case: Case) -> None:
    net, cache = converted_model(model, case), DynamicCache()
    net(IDS, **through(cache))
    with pytest.raises(ValueError, match="must cover all 22"):
        net(IDS[:, :2], attention_mask=torch.tensor([[0, 1], [1, 1]]), **through(cache))


@defaults
@on_every_model
def test_rolling_back_what_was_not_recorded_is_refused(model: str, case: Case) -> None:
    net, cache = converted_model(model, case), DynamicCache(config=converted_model(model, case).config)
    net(IDS, **through(cache))
    cache.crop(0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)


@defaults
def test_learned_positions_end_with_a_message(case: Case) -> None:
    net = converted_model("gpt2", case)
    assert net(tokens(1, 128)).logits.shape[1] == 128
    with pytest.raises(ValueError, match="position 128 is beyond the 128 learned positions"):
        net(tokens(1, 129))
    cache = DynamicCache()
    net(tokens(1, 128), **through(cache))
    with pytest.raises(ValueError, match="beyond the 128 learned positions"):
        net(tokens(1, 1), **through(cache))


def test_rotary_models_go_on_past_their_trained_length() -> None:
    net = converted_model("llama-gqa", DEFAULTS[0])
    assert net(tokens(1, 300)).logits.isfinite().all()


@on_every_model
def test_a_conversion_of_an_inner_model_alone_is_reported(model: str) -> None:
    net = tiny_model(model)
    inner = getattr(net, net.base_model_prefix)
    inner.convert_attention("sparse", window=4)
    for call in (net.revert_attention, net.attention_report, lambda: net.convert_attention("linear")):
        with pytest.raises(ValueError, match="inner model.*converted by itself"):
            call()
    inner.revert_attention()
    net.convert_attention("linear")


@on_every_model
def test_the_implementation_is_not_set_by_name(model: str) -> None:
    net = tiny_model(model)
    net.set_attn_implementation("hf_effattn")
    with pytest.raises(ValueError, match="convert_attention"):
        net(IDS)


def test_a_folder_of_a_later_format_is_refused(tmp_path: Path) -> None:
    net = tiny_model("llama-gqa").convert_attention("sparse", window=4)
    net.config.effattn["version"] = 2
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format 2; this hf_effattn reads format 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@on_every_model
def test_a_conversion_that_was_undone_behind_our_back_is_reported(model: str) -> None:
    net = tiny_model(model).convert_attention("sparse", window=4)
    module = next(module for module in net.modules() if hasattr(module, "effattn"))
    module._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="does not compute it"):
        net.attention_report()


@pytest.mark.parametrize("length", [0, -1, 1.5, True, None])
def test_the_report_names_a_bad_context_length(length: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        tiny_model("gpt2").attention_report(context_length=length)


def test_the_vocabulary_of_the_matrix_is_that_of_its_models() -> None:
    assert tiny_model("gpt2").config.vocab_size == VOCABULARY
