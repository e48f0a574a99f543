"""Law 8: what is saved loads converted, everywhere and exactly, and never silently dense."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix import (
    COMPOSITIONS,
    DEFAULTS,
    MODELS,
    OF_FOUR_HEADS,
    ONE_CASE_EACH,
    Case,
    converted_model,
    shake,
    tiny_config,
    tiny_model,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from hf_effattn.integration.classes import original_class

on_every_model = pytest.mark.parametrize("model", MODELS)
defaults = pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
IDS = tokens(2, 30)


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
@on_every_model
def test_a_saved_conversion_loads_converted(model: str, case: Case, tmp_path: Path) -> None:
    net = converted_model(model, case)
    net.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(net)
    assert torch.equal(loaded.eval()(IDS).logits, net(IDS).logits)
    assert str(loaded.attention_report()) == str(net.attention_report())
    reverted = loaded.revert_attention()
    assert type(reverted) is original_class(type(net))
    assert torch.equal(reverted(IDS).logits, tiny_model(model)(IDS).logits)


@defaults
@on_every_model
def test_shards_and_mixed_layers_survive(model: str, case: Case, tmp_path: Path) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, layers=[1], **case.options))
    net.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, net(IDS).logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    inner = getattr(net, net.base_model_prefix)
    assert torch.equal(base(IDS).last_hidden_state, inner(IDS).last_hidden_state)


@pytest.mark.slow
@on_every_model
def test_a_fresh_process_gives_the_same_logits(model: str, tmp_path: Path) -> None:
    net = shake(tiny_model(model).convert_attention("linear", window=6, num_sinks=2))
    net.save_pretrained(tmp_path)
    torch.save(IDS, tmp_path / "ids.pt")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(net))
    code = """
import pickle, sys, torch, hf_effattn
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids = torch.load(folder + "/ids.pt")
loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
pickled = pickle.load(open(folder + "/model.pickle", "rb"))
torch.save([loaded(ids).logits, pickled(ids).logits], folder + "/logits.pt")
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    for logits in torch.load(tmp_path / "logits.pt"):
        assert torch.equal(logits, net(IDS).logits)


@pytest.mark.slow
def test_without_the_plugin_loading_fails_loudly(tmp_path: Path) -> None:
    converted_model("llama-gqa", DEFAULTS[2]).save_pretrained(tmp_path)
    code = "import sys; from transformers import {0}; {0}.from_pretrained(sys.argv[1])"
    automatic = run(code.format("AutoModelForCausalLM"), tmp_path)
    assert automatic.returncode != 0
    assert "effattn_llama" in automatic.stderr
    concrete = run(code.format("LlamaForCausalLM"), tmp_path)
    assert concrete.returncode != 0
    assert "hf_effattn" in concrete.stderr


def test_the_plain_class_refuses_a_converted_folder(tmp_path: Path) -> None:
    converted_model("llama-gqa", DEFAULTS[2]).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="hf_effattn"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@on_every_model
def test_missing_and_unexpected_parameters_are_errors(model: str, tmp_path: Path) -> None:
    converted_model(model, DEFAULTS[0]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if ".effattn." in key)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks parameters: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    extra = name.rpartition(".")[0] + ".surplus"
    save_file({**weights, extra: torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not know: {extra}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@defaults
@on_every_model
def test_a_softmax_checkpoint_takes_a_converted_config(model: str, case: Case, tmp_path: Path) -> None:
    """Learned parameters that no checkpoint has get their documented start, not whatever was in memory."""
    tiny_model(model).save_pretrained(tmp_path)
    expected = tiny_model(model).convert_attention(case.mechanism, **case.options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=expected.config).eval()
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    fresh = AutoModelForCausalLM.from_config(expected.config)
    for name, parameter in expected.named_parameters():
        if ".effattn." in name:
            assert torch.equal(fresh.get_parameter(name), parameter)


@defaults
@on_every_model
def test_copies_are_whole_and_apart(model: str, case: Case) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, **case.options))
    expected = net(IDS).logits
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(IDS).logits, expected)
        twin.revert_attention()
        assert torch.equal(twin(IDS).logits, tiny_model(model)(IDS).logits)
        assert torch.equal(net(IDS).logits, expected)


class MyLlama(LlamaForCausalLM):
    """A model class of the user's own."""


def test_classes_of_ones_own_have_their_own_twins() -> None:
    def cell() -> type:
        return type("MyLlama", (LlamaForCausalLM,), {})  # a notebook cell that is run again

    for kind in (MyLlama, cell(), cell()):
        net = kind(tiny_config("llama-gqa")).eval().convert_attention("sparse", window=4)
        assert isinstance(net, kind)
        if kind is MyLlama:
            assert torch.equal(pickle.loads(pickle.dumps(net))(IDS).logits, net(IDS).logits)
        assert type(net.revert_attention()) is kind


@on_every_model
def test_the_config_is_json_and_comes_back(model: str, tmp_path: Path) -> None:
    net = tiny_model(model).convert_attention("sparse", pattern=COMPOSITIONS["window|sinks"], layers=[0])
    net.config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == f"effattn_{MODELS[model]['model_type']}"
    assert data["effattn"]["layers"][0]["mechanism"] == "sparse"
    assert data["effattn"]["layers"][1] is None
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(net.config)
    assert again.effattn["layers"] == net.config.effattn["layers"]
    again.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == data


@on_every_model
def test_half_precision_saves_and_loads(model: str, tmp_path: Path) -> None:
    converted_model(model, DEFAULTS[0]).save_pretrained(tmp_path / "full")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16).eval()
    net.save_pretrained(tmp_path / "half")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(IDS).logits, net(IDS).logits)
