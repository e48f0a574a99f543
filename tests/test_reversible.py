"""Law 7: converting can be undone bit for bit, and a window longer than the text changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from families import NUM_LAYERS
from matrix import MODELS, OF_FOUR_HEADS, ONE_CASE_EACH, Case, through, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

import hf_effattn
from hf_effattn import LinearConfig, SparseConfig

on_every_model = pytest.mark.parametrize("model", MODELS)


@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
@on_every_model
def test_revert_restores_everything(model: str, case: Case) -> None:
    net, ids = tiny_model(model), tokens(2, 30)
    names, config, kind = list(net.state_dict()), copy.deepcopy(net.config), type(net)
    logits = net(ids).logits
    assert net.convert_attention(case.mechanism, **case.options) is net
    assert type(net) is not kind
    assert isinstance(net, kind)
    assert not torch.allclose(net(ids).logits, logits, atol=1e-3)
    assert net.revert_attention() is net
    assert type(net) is kind
    assert type(net.config) is type(config)
    assert net.config.to_dict() == config.to_dict()
    assert net.config._attn_implementation == config._attn_implementation
    assert list(net.state_dict()) == names
    assert all(type(m).__module__.startswith(("transformers", "torch")) for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net(ids).logits, logits)
    assert torch.equal(net.generate(ids, max_new_tokens=4), tiny_model(model).generate(ids, max_new_tokens=4))


@pytest.mark.parametrize("options", [{"mechanism": "linear"}, {"mechanism": "sparse"}], ids=lambda o: o["mechanism"])
@on_every_model
def test_a_window_longer_than_the_text_changes_nothing(model: str, options: dict) -> None:
    net, ids = tiny_model(model), tokens(2, 60)
    expected = net(ids).logits
    net.convert_attention(**options, window=100, num_sinks=4)
    assert torch.equal(net(ids, use_cache=False).logits, expected)
    cache = DynamicCache(config=net.config)
    parts = [net(ids[:, a:b], **through(cache)).logits for a, b in ((0, 20), (20, 21), (21, 60))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


@on_every_model
def test_other_models_stay_as_they_are(model: str) -> None:
    """Teacher and student side by side, even when made from one config object."""
    config = tiny_config(model)
    teacher, student = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    ids = tokens(1, 30)
    before = teacher(ids).logits
    student.convert_attention("linear", window=4, num_sinks=0)
    assert torch.equal(teacher(ids).logits, before)
    assert not hasattr(config, "effattn")
    assert teacher.config is not student.config


@on_every_model
def test_calls_add_up(model: str) -> None:
    net, ids = tiny_model(model), tokens(1, 30)
    original = net(ids).logits
    net.convert_attention("sparse", layers=[0], window=4)
    net.convert_attention("linear", layers=[-1], window=3, num_sinks=0)
    kinds = [layer.mechanism for layer in net.attention_report(context_length=50).layers]
    assert kinds[0].startswith("sparse streaming(window=4")
    assert kinds[-1].startswith("linear hedgehog(window=3")
    net.convert_attention(
        LinearConfig(window=0, num_sinks=0, feature_map="elu"), keep_softmax=list(range(1, NUM_LAYERS))
    )
    kinds = [layer.mechanism for layer in net.attention_report(context_length=50).layers]
    assert kinds[0].startswith("linear elu")
    assert kinds[-1].startswith("linear hedgehog"), "a layer that is kept stays what it was"
    net.revert_attention()
    assert torch.equal(net(ids).logits, original)


@on_every_model
def test_converting_again_equals_converting_once(model: str) -> None:
    ids = tokens(1, 30)
    twice = tiny_model(model).convert_attention("linear").convert_attention("sparse", window=5)
    once = tiny_model(model).convert_attention(SparseConfig(window=5))
    assert torch.equal(twice(ids).logits, once(ids).logits)
    assert list(twice.state_dict()) == list(once.state_dict())


@on_every_model
def test_softmax_layers_follow_set_attn_implementation_and_converted_ones_do_not(model: str) -> None:
    net, ids = tiny_model(model).convert_attention("sparse", layers=[0], window=4), tokens(1, 30)
    before = net(ids).logits
    net.set_attn_implementation("eager")
    torch.testing.assert_close(net(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert net.attention_report().layers[0].mechanism.startswith("sparse")
    assert net.attention_report().layers[1].backend == "eager"
    net.revert_attention()
    assert net.config._attn_implementation == "eager"


def test_reverting_an_unconverted_model_is_no_error() -> None:
    net = tiny_model("gpt2")
    assert net.revert_attention() is net


def test_the_function_and_the_method_are_one() -> None:
    net = tiny_model("gpt2")
    assert hf_effattn.convert_attention(net, "linear") is net
    assert hf_effattn.attention_report(net).layers[0].mechanism.startswith("linear")
    assert hf_effattn.revert_attention(net) is net


@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
@on_every_model
def test_other_heads_convert_too(model: str, case: Case) -> None:
    config = tiny_config(model, num_labels=3)
    net = AutoModelForSequenceClassification.from_config(config).eval()
    ids = tokens(2, 20)
    before = net(ids).logits
    net.convert_attention(case.mechanism, **case.options)
    assert net(ids).logits.shape == (2, 3)
    assert not torch.equal(net(ids).logits, before)
    net.revert_attention()
    assert torch.equal(net(ids).logits, before)
