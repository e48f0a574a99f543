"""An adapter inside the model: one line loads it, the class stays, and everything can be taken out again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from matrix import DEFAULTS, close, tiny_config, tiny_model, tokens, with_fitting_peft
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import TARGETS, edit, learned, logits, mixed, snapshot, student, tuned
from torch import nn
from transformers import AutoModelForCausalLM

from hf_effattn import LinearConfig
from hf_effattn.evaluation.variants import Variant, as_variant, digest_of, mechanisms
from hf_effattn.recovery import as_teacher, load_adapter, merge_adapter, save_adapter
from hf_effattn.recovery.adapter_names import local

LLAMA = "llama-gqa"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora and maps": {"maps": ["effattn"]},
    "dora": {"use_dora": True},
    "head": {"maps": ["lm_head"]},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
on_two_models = pytest.mark.parametrize("model", TARGETS)


def stored(folder: Path, model: str = LLAMA, **options: Any) -> Any:
    """Save a student with LoRA; return it."""
    net = tuned(student(model), model, **options)
    save_adapter(net, folder)
    return net


def recovered(folder: Path, model: str = LLAMA) -> Any:
    return tiny_model(model).convert_attention("linear", adapter=folder)


def everything(net: Any) -> tuple[Any, ...]:
    """All that a conversion may change, and must give back."""
    tensors = {name: (x.clone(), getattr(x, "requires_grad", False)) for name, x in net.named_parameters()}
    modules = {name: (type(module), module.training) for name, module in net.named_modules()}
    return tensors.keys(), modules, net.config.to_json_string(), vars(net).keys(), [g for _, g in tensors.values()]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def refuse(name: str, **kwargs: Any) -> str:
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return asked


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of shipped adapters, with `tiny/linear` and `tiny/other`."""
    root = tmp_path / "shipped"
    monkeypatch.setattr("hf_effattn.recovery.adapter_names.SHIPPED", root)
    stored(root / "tiny" / "linear")
    save_adapter(student(LLAMA), root / "tiny" / "other")
    (root / "tiny" / "notes").mkdir()
    return root


@every_kind
@on_two_models
def test_it_is_what_load_adapter_gives_in_the_model_itself(model: str, kind: str, tmp_path: Path) -> None:
    stored(tmp_path, model, **KINDS[kind])
    net = tiny_model(model)
    before, dense = everything(net), logits(net)
    weights = {name: x.clone() for name, x in net.state_dict().items()}
    assert net.convert_attention("linear", adapter=tmp_path) is net
    assert type(net).__name__ == f"EffAttn{type(tiny_model(model)).__name__}"
    wrapped = load_adapter(tiny_model(model), tmp_path)
    assert isinstance(wrapped, PeftModel)
    assert torch.equal(logits(net), logits(wrapped))
    assert not torch.allclose(logits(net), logits(student(model)), atol=1e-3)  # LoRA does something
    assert net.config.to_dict() == wrapped.get_base_model().config.to_dict()
    assert str(net.attention_report()) == str(wrapped.attention_report())
    assert not any(x.requires_grad for x in net.parameters())
    assert net.revert_attention() is net
    assert everything(net) == before
    assert torch.equal(logits(net), dense)
    assert all(torch.equal(weights[name], x) for name, x in net.state_dict().items())


@on_two_models
def test_one_without_lora_too(model: str, tmp_path: Path) -> None:
    save_adapter(student(model), tmp_path / "adapter")
    net = recovered(tmp_path / "adapter", model)
    assert torch.equal(logits(net), logits(student(model)))
    net.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()), logits(net))
    net = recovered(tmp_path / "adapter", model)
    assert everything(net.revert_attention()) == everything(tiny_model(model))


def test_it_generates_with_its_cache(tmp_path: Path) -> None:
    stored(tmp_path)
    net, wrapped = recovered(tmp_path), load_adapter(tiny_model(LLAMA), tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = tokens(2, 20)
    found = net.generate(ids, **options)
    assert torch.equal(found, wrapped.generate(input_ids=ids, **options))
    assert torch.equal(found, net.generate(ids, use_cache=False, **options))


@with_fitting_peft
def test_modes_copies_and_the_teacher(tmp_path: Path) -> None:
    stored(tmp_path)
    dense = logits(tiny_model(LLAMA))
    net = tiny_model(LLAMA).train().convert_attention("linear", adapter=tmp_path)
    assert all(module.training for module in net.modules())
    net.eval()
    expected, twin = logits(net), copy.deepcopy(net)
    with as_teacher(net):
        close(logits(net), dense)
    net.disable_adapters()  # transformers' own
    assert not torch.equal(logits(net), expected)
    net.enable_adapters()
    assert torch.equal(logits(net), expected)
    assert torch.equal(logits(twin.revert_attention()), dense)
    assert torch.equal(logits(net), expected)
    torch.save(net, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(again.revert_attention()), dense)


@every_kind
@on_two_models
def test_saving_it(model: str, kind: str, tmp_path: Path) -> None:
    stored(tmp_path / "adapter", model, **KINDS[kind])
    net = recovered(tmp_path / "adapter", model)
    expected = logits(net)
    with pytest.raises(ValueError, match=r"save_adapter\(model, folder\), or the whole model after merge_adapter"):
        net.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    save_adapter(net, tmp_path / "again")
    for file in ("effattn.safetensors", "adapter_model.safetensors"):
        first, second = (load_file(tmp_path / folder / file) for folder in ("adapter", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert torch.equal(logits(recovered(tmp_path / "again", model)), expected)
    merged = merge_adapter(net)
    assert merged is net
    close(logits(net), expected)
    net.save_pretrained(tmp_path / "whole")
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(whole.eval()), logits(net))


@every_kind
def test_it_takes_the_place_of_conversions(kind: str, tmp_path: Path) -> None:
    stored(tmp_path, **KINDS[kind])
    net = student(LLAMA, DEFAULTS[1])
    net.convert_attention("linear", adapter=tmp_path)
    assert torch.equal(logits(net), logits(recovered(tmp_path)))
    before = snapshot(net)
    with pytest.raises(ValueError, match="carries a PEFT adapter; merge, unload or revert it first"):
        net.convert_attention("linear", adapter=tmp_path)
    assert snapshot(net) == before
    net.convert_attention("sparse", layers=[0], window=4)  # calls add up: LoRA stays
    assert not torch.equal(logits(net), logits(recovered(tmp_path)))
    assert torch.equal(logits(net.revert_attention()), logits(tiny_model(LLAMA)))
    net.convert_attention("linear", adapter=tmp_path)
    assert torch.equal(logits(net), logits(recovered(tmp_path)))


def test_an_adapter_of_several_mechanisms_goes_by_each(tmp_path: Path) -> None:
    net = tuned(mixed(LLAMA), LLAMA)
    save_adapter(net, tmp_path)
    for mechanism in ("linear", "sparse"):
        loaded = tiny_model(LLAMA).convert_attention(mechanism, adapter=tmp_path)
        assert torch.equal(logits(loaded), logits(net))


@with_fitting_peft
def test_lora_of_others_stays(tmp_path: Path) -> None:
    net = student(LLAMA)
    net.add_adapter(LoraConfig(r=4, target_modules=TARGETS[LLAMA], init_lora_weights=False), "mine")
    net.save_pretrained(tmp_path)  # as transformers does
    assert (tmp_path / "adapter_model.safetensors").exists()
    net.revert_attention()
    assert any("lora_" in name for name, _ in net.named_parameters())


@pytest.mark.parametrize(
    ("mechanism", "options", "message"),
    [
        ("sparse", {}, "has layers of 'linear'; got the mechanism 'sparse'"),
        ("none", {}, "has layers of 'linear'; got the mechanism 'none'"),
        (LinearConfig(window=6), {}, "has layers of 'linear'; got the mechanism LinearConfig"),
        ("linear", {"layers": [0]}, "layers does not go with an adapter"),
        ("linear", {"keep_softmax": []}, "keep_softmax does not go with an adapter"),
        ("linear", {"window": None}, "window does not go with an adapter"),
        ("linear", {"feature_map": "elu"}, "feature_map does not go with an adapter"),
    ],
)
def test_what_the_adapter_says_cannot_be_said_again(
    mechanism: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stored(tmp_path)
    net = tiny_model(LLAMA)
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        net.convert_attention(mechanism, adapter=tmp_path, **options)
    assert snapshot(net) == before


def test_other_models_and_broken_folders_are_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    wrong = {
        "type 'llama' with 2 layers; got 'gpt2' with 2": tiny_model("gpt2"),
        "'llama' with 3": AutoModelForCausalLM.from_config(tiny_config(LLAMA, num_hidden_layers=3)),
        "got .*'head_dim': 8": AutoModelForCausalLM.from_config(tiny_config(LLAMA, head_dim=8)),
    }
    for message, net in wrong.items():
        before = snapshot(net)
        with pytest.raises(ValueError, match=message):
            net.convert_attention("linear", adapter=tmp_path)
        assert snapshot(net) == before
    with pytest.raises(ValueError, match="carries a PEFT adapter"):
        tuned(student(LLAMA), LLAMA).convert_attention("linear", adapter=tmp_path)
    state = load_file(tmp_path / "effattn.safetensors")
    state.popitem()
    save_file(state, tmp_path / "effattn.safetensors", {"format": "pt"})
    net = tiny_model(LLAMA)
    before = snapshot(net)
    with pytest.raises(ValueError, match="effattn.safetensors lacks"):
        net.convert_attention("linear", adapter=tmp_path)
    edit(tmp_path, version=2)
    with pytest.raises(ValueError, match="format 2"):
        net.convert_attention("linear", adapter=tmp_path)
    assert snapshot(net) == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "has peft_type='IA3'"),
        (PromptTuningConfig(num_virtual_tokens=5), "has peft_type='PROMPT_TUNING'"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "has init_lora_weights='olora'"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "has bias='all'"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), r"has alora_invocation_tokens=\[3\]"),
        (LoraConfig(target_modules=["embed_tokens"]), "changes model.embed_tokens.base_layer.weight"),
    ],
    ids=["ia3", "prompt", "olora", "bias", "alora", "embeddings"],
)
def test_what_could_not_be_taken_out_again_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    config.task_type = "CAUSAL_LM"
    save_adapter(get_peft_model(student(LLAMA), config), tmp_path)
    net = tiny_model(LLAMA)
    before = snapshot(net)
    with pytest.raises(ValueError, match=f"{reason}, so it cannot be loaded into the model itself .*load_adapter"):
        net.convert_attention("linear", adapter=tmp_path)
    assert snapshot(net) == before


def test_shipped_adapters_go_by_name(
    shipped: Path, no_hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = logits(recovered(shipped / "tiny" / "linear"))
    assert torch.equal(logits(tiny_model(LLAMA).convert_attention("linear", adapter="tiny/linear")), expected)
    assert torch.equal(logits(load_adapter(tiny_model(LLAMA), "tiny/linear")), expected)
    net, variant = tiny_model(LLAMA), Variant.parse("adapter:tiny/linear")
    assert [config.mechanism for config in mechanisms(net, variant)] == ["linear", "linear"]
    assert digest_of(variant) == digest_of(Variant.parse(f"adapter:{shipped / 'tiny' / 'linear'}"))
    with as_variant(net, variant):
        assert torch.equal(logits(net), expected)
    assert no_hub == []
    stored(tmp_path / "tiny" / "linear", r=2)  # a folder of this name comes first
    assert local("tiny/linear") == Path("tiny/linear")
    assert not torch.equal(logits(tiny_model(LLAMA).convert_attention("linear", adapter="tiny/linear")), expected)


def test_names_that_are_nowhere_are_told_those_that_are_there(shipped: Path, no_hub: list[str]) -> None:
    names = ["tiny/linaer", "tiny/notes"]
    for name in names:
        with pytest.raises(FileNotFoundError, match=f"no folder '{name}', and no such repository .*: off") as caught:
            tiny_model(LLAMA).convert_attention("linear", adapter=name)
        assert str(caught.value).endswith("\nShipped adapters: tiny/linear, tiny/other")
    assert no_hub == names


def test_without_a_clone_nothing_ships(no_hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_effattn.recovery.adapter_names.SHIPPED", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="come with a clone of the repository only .*none.*; give a folder"):
        tiny_model(LLAMA).convert_attention("linear", adapter="tiny/linear")


def test_all_that_ships_is_whole_and_small() -> None:
    from hf_effattn.recovery.adapter_files import read
    from hf_effattn.recovery.adapter_names import SHIPPED, shipped

    assert SHIPPED.parent == Path(__file__).parent.parent / "recipes" / "results"
    found = shipped()
    assert "smollm2-135m/linear" in found
    for folder in found.values():
        read(folder).check_whole()
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
        assert (folder / "README.md").is_file()


def test_peft_is_imported_when_an_adapter_is_asked_for() -> None:
    code = """
import sys, hf_effattn, json
before = "peft" in sys.modules
from transformers import LlamaConfig, LlamaForCausalLM
try:
    LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=8, vocab_size=8,
        num_attention_heads=1)).convert_attention("linear", adapter="/no/such/place")
except FileNotFoundError:
    print(json.dumps([before, "peft" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True]


def test_the_base_may_be_trained_again_after_a_merge(tmp_path: Path) -> None:
    stored(tmp_path)
    net = recovered(tmp_path)
    net.model.norm.weight.requires_grad_(True)
    merge_adapter(net)
    assert {name for name, x in net.named_parameters() if not x.requires_grad} == {
        name for name, _ in net.named_parameters() if ".effattn." in name
    }
    assert not any(isinstance(module, nn.ModuleDict) for module in net.modules())
    assert learned(net)
