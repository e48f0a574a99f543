"""Adapter-only checkpoints: what was added comes back on any base, exactly, or the model stays as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from matrix import DEFAULTS, Case, close, converted_model, shake, tiny_config, tiny_model, tokens, with_fitting_peft
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_effattn.recovery import load_adapter, merge_adapter, push_adapter, save_adapter

IDS = tokens(2, 30)
TARGETS = {"llama-gqa": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
WINDOW = DEFAULTS[0]
CASES = [
    WINDOW,
    Case("hedgehog", "linear", {"window": 0}),
    Case("gla", "linear", {"window": 0, "recurrence": "gla"}),
    Case("performer", "linear", {"window": 4, "feature_map": "performer", "recurrence": "retnet"}),
]
on_two_models = pytest.mark.parametrize("model", TARGETS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
with_or_without_maps = pytest.mark.parametrize("maps", [None, ["effattn"]], ids=["lora", "lora and maps"])


def mixed(model: str) -> Any:
    """A random pattern in layer 1, where converting anew would draw it anew; layer 0 linear."""
    net = tiny_model(model).convert_attention("linear", layers=[0], window=4)
    return shake(net.convert_attention("sparse", layers=[1], pattern="bigbird", block_size=4, num_random=2))


def tuned(net: Any, model: str, maps: list[str] | None = None, **options: Any) -> PeftModel:
    """`net` with LoRA, all of whose trainable numbers are moved away from their start."""
    options = {"r": 4, "target_modules": TARGETS[model], "modules_to_save": maps, **options}
    wrapped = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return wrapped


@torch.no_grad()
def logits(net: Any) -> torch.Tensor:
    """Without gradients: layers that record them round otherwise, and what was loaded is frozen."""
    return net(IDS).logits


def student(model: str, case: Case = WINDOW) -> Any:
    torch.manual_seed(3)  # what gla starts with is drawn
    return shake(tiny_model(model).convert_attention(case.mechanism, **case.options))


def size(folder: Path) -> int:
    """Bytes of all tensors in the folder."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return sum(x.nbytes for tensors in files for x in tensors.values())


def snapshot(net: nn.Module) -> tuple[Any, ...]:
    """All that a refused load must leave alone."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    held = {name: (id(x), x.requires_grad, x._version) for name, x in tensors.items()}
    modules = {name: (id(module), type(module), module.training) for name, module in net.named_modules()}
    return held, modules, net.config.to_json_string(), torch.get_rng_state().tolist()


@every_case
@on_two_models
def test_a_conversion_comes_back_on_any_base(model: str, case: Case, tmp_path: Path) -> None:
    net = converted_model(model, case)
    save_adapter(net, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"effattn.json", "effattn.safetensors"}
    assert size(tmp_path) == sum(x.nbytes for name, x in net.state_dict().items() if ".effattn." in name)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < size(tmp_path) + 6000
    other = tiny_model(model).convert_attention("linear", layers=[0], feature_map="elu")
    for base in (tiny_model(model), other, student(model, case)):
        loaded = load_adapter(base, tmp_path)
        assert loaded is base
        assert torch.equal(logits(loaded), logits(net))
        assert str(loaded.attention_report()) == str(net.attention_report())
        assert loaded.config.to_dict() == net.config.to_dict()
    assert torch.equal(logits(loaded.revert_attention()), logits(tiny_model(model)))


@with_or_without_maps
@every_case
@on_two_models
def test_lora_comes_back_and_remains_one_of_pefts(model: str, case: Case, maps: Any, tmp_path: Path) -> None:
    net = tuned(student(model, case), model, maps)
    save_adapter(net, tmp_path)
    state = net.state_dict()
    added = {
        name: x for name, x in state.items() if "lora_" in name or (".effattn." in name and "original_" not in name)
    }
    assert size(tmp_path) == sum(x.nbytes for x in added.values())  # nothing twice
    loaded = load_adapter(tiny_model(model), tmp_path)
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded), logits(net))
    again = PeftModel.from_pretrained(student(model, case), tmp_path).eval()
    assert torch.equal(logits(again), logits(net))
    merged = merge_adapter(loaded)
    close(logits(merged), logits(net))
    merged.save_pretrained(tmp_path / "merged")
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(whole.eval()), logits(merged))
    save_adapter(merged, tmp_path)  # and what the LoRA left is gone
    assert not list(tmp_path.glob("adapter_*"))
    plain = load_adapter(tiny_model(model), tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(learned(plain), learned(merged), strict=True))


def learned(net: nn.Module) -> list[torch.Tensor]:
    return [x for name, x in net.state_dict().items() if ".effattn." in name]


@on_two_models
def test_half_precision_in_the_files(model: str, tmp_path: Path) -> None:
    net = tuned(mixed(model), model, None)
    save_adapter(net, tmp_path / "full")
    save_adapter(net, tmp_path / "half", dtype=torch.bfloat16)
    assert size(tmp_path / "half") * 2 == size(tmp_path / "full")
    for name, x in net.named_parameters():
        if "lora_" in name or ".effattn." in name:
            x.data = x.data.bfloat16().to(x.dtype)
    loaded = load_adapter(tiny_model(model), tmp_path / "half")
    assert torch.allclose(logits(loaded), logits(net), atol=1e-2)
    assert all(torch.equal(x, y) for x, y in zip(learned(loaded), learned(net), strict=True))
    with pytest.raises(TypeError, match=r"dtype must be a floating-point type or None; got torch\.int8"):
        save_adapter(net, tmp_path, dtype=torch.int8)


@with_or_without_maps
@on_two_models
def test_layers_may_differ(model: str, maps: Any, tmp_path: Path) -> None:
    net = mixed(model)
    save_adapter(net, tmp_path / "plain")
    loaded = load_adapter(tiny_model(model), tmp_path / "plain")
    assert loaded.config.effattn == net.config.effattn
    assert torch.equal(logits(loaded), logits(net))
    wrapped = tuned(net, model, maps)
    save_adapter(wrapped, tmp_path / "lora")
    assert torch.equal(logits(load_adapter(tiny_model(model), tmp_path / "lora")), logits(wrapped))


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits(tmp_path: Path) -> None:
    torch.save(IDS, tmp_path / "ids.pt")
    nets = {model: tuned(mixed(model), model, ["effattn"]) for model in TARGETS}
    for model, net in nets.items():
        base = tmp_path / model / "base"
        tiny_model(model).save_pretrained(base)
        save_adapter(net, tmp_path / model / "adapter", base=str(base))
        config = json.loads((tmp_path / model / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
    code = """
import json, pathlib, sys, torch, hf_effattn
torch.set_num_threads(1)
from hf_effattn.recovery.adapters import load_adapter
from transformers import AutoModelForCausalLM
ids, *folders = map(pathlib.Path, sys.argv[1:])
for folder in folders:
    name = json.loads((folder / "adapter" / "effattn.json").read_text())["base_model"]
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(name).eval(), folder / "adapter")
    torch.save(loaded(torch.load(ids)).logits, folder / "logits.pt")
"""
    folders = [str(tmp_path / model) for model in nets]
    command = [sys.executable, "-c", code, str(tmp_path / "ids.pt"), *folders]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for model, net in nets.items():
        assert torch.equal(torch.load(tmp_path / model / "logits.pt"), logits(net))


@pytest.mark.parametrize("full", [True, False])
@with_or_without_maps
def test_half_precision(maps: Any, full: bool, tmp_path: Path) -> None:
    net = tiny_model("llama-gqa").to(torch.bfloat16).convert_attention("linear", window=6)
    net = tuned(shake(net), "llama-gqa", maps) if full else tuned(shake(net), "llama-gqa", maps).to(torch.bfloat16)
    save_adapter(net, tmp_path)
    loaded = load_adapter(tiny_model("llama-gqa").to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded), logits(net))
    dtypes = {name: x.dtype for name, x in net.named_parameters()}
    assert {name: x.dtype for name, x in loaded.named_parameters()} == dtypes
    assert json.loads((tmp_path / "effattn.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "olora"}, {"modules_to_save": ["lm_head"]}]
)
def test_other_kinds_of_lora(options: dict[str, Any], tmp_path: Path) -> None:
    net = tuned(student("llama-gqa"), "llama-gqa", **options)
    save_adapter(net, tmp_path)
    close(logits(load_adapter(tiny_model("llama-gqa"), tmp_path)), logits(net))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts(kind: Any, tmp_path: Path) -> None:
    net = get_peft_model(student("llama-gqa"), kind(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    save_adapter(net, tmp_path)
    with pytest.raises(ValueError, match="trainable=False"):
        load_adapter(tiny_model("llama-gqa"), tmp_path, trainable=True)
    assert torch.equal(logits(load_adapter(tiny_model("llama-gqa"), tmp_path)), logits(net))
    with pytest.raises(ValueError, match="adds tokens"):
        merge_adapter(net)


@with_fitting_peft
def test_an_adapter_inside_the_model_and_one_of_several(tmp_path: Path) -> None:
    net = student("llama-gqa")
    inside = LoraConfig(r=4, target_modules=TARGETS["llama-gqa"], init_lora_weights=False)
    net.add_adapter(inside, "mine")
    save_adapter(net, tmp_path / "inside")
    assert torch.equal(logits(load_adapter(tiny_model("llama-gqa"), tmp_path / "inside")), logits(net))
    with pytest.raises(ValueError, match="give the PeftModel around it"):
        merge_adapter(net)
    several = tuned(student("llama-gqa"), "llama-gqa", ["effattn"])
    several.add_adapter("second", inside)
    for name in ("second", "default"):
        several.set_adapter(name)
        save_adapter(several, tmp_path / name)
        assert torch.equal(logits(load_adapter(tiny_model("llama-gqa"), tmp_path / name)), logits(several))
    several.base_model.set_adapter(["second", "default"])
    with pytest.raises(ValueError, match="active: default, second"):
        save_adapter(several, tmp_path / "both")
    assert not (tmp_path / "both").exists()


@with_or_without_maps
def test_what_is_trainable(maps: Any, tmp_path: Path) -> None:
    save_adapter(student("gpt2"), tmp_path / "plain")
    save_adapter(tuned(student("gpt2"), "gpt2", maps), tmp_path / "lora")
    for folder, base in (("plain", True), ("lora", False)):
        for trainable in (True, False):
            loaded = load_adapter(tiny_model("gpt2"), tmp_path / folder, trainable=trainable)
            for name, parameter in loaded.named_parameters():
                added = "lora_" in name or (".effattn." in name and "original_module" not in name)
                expected = trainable if added else base and ".effattn." not in name
                assert parameter.requires_grad is expected, name


def edit(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "effattn.json").read_text())
    data |= {key: value for key, value in changes.items() if value is not None}
    kept = {key: value for key, value in data.items() if changes.get(key, "") is not None}
    (folder / "effattn.json").write_text(json.dumps(kept))


def edit_tensors(folder: Path, file: str, part: str, change: str) -> None:
    tensors = load_file(folder / file)
    name = next(key for key in tensors if part in key)
    if change == "lacks":
        del tensors[name]
    elif change == "more":
        tensors[name.replace(part, part + "x")] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = torch.cat((tensors[name], tensors[name]))
    else:
        tensors[name] = tensors[name] + 1
    save_file(tensors, folder / file, {"format": "pt"})


LEARNED, LORA = ("effattn.safetensors", "key_map"), ("adapter_model.safetensors", "lora_A")
BROKEN: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no description": (lambda f: (f / "effattn.json").unlink(), "effattn.json is missing"),
    "no weights": (lambda f: (f / "effattn.safetensors").unlink(), "effattn.safetensors is missing"),
    "no LoRA": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "no PEFT config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no JSON": (lambda f: (f / "effattn.json").write_text("{"), "effattn.json is no JSON"),
    "cut": (lambda f: (f / "effattn.safetensors").write_bytes(b"{}"), "effattn.safetensors cannot be read"),
    "version": (lambda f: edit(f, version=2), "format 2; this hf_effattn reads format 1"),
    "list": (lambda f: (f / "effattn.json").write_text("[]"), "format None"),
    "conversion": (lambda f: edit(f, effattn={"version": 9}), "the conversion in .* is of format 9"),
    "field": (lambda f: edit(f, heads=None), "lacks heads"),
    "layers": (lambda f: edit(f, heads=[]), "does not describe 2 layers"),
    "type": (lambda f: edit(f, model_type="gpt2"), "type 'gpt2' with 2 layers; got 'llama' with 2"),
    "missing": (lambda f: edit_tensors(f, *LEARNED, "lacks"), "lacks model.layers.0.self_attn.effattn.key_map.weight"),
    "unexpected": (lambda f: edit_tensors(f, *LEARNED, "more"), "has what the model has not: .*effattn.key_mapx"),
    "shape": (lambda f: edit_tensors(f, *LEARNED, "shape"), r"other shapes .*key_map.weight \(\[4, 16, 16\] instead"),
    "values": (lambda f: edit_tensors(f, *LEARNED, "value"), "effattn.safetensors is not the one that was saved with"),
    "LoRA missing": (lambda f: edit_tensors(f, *LORA, "lacks"), "adapter_model.safetensors lacks base_model.*lora_A"),
    "LoRA unexpected": (lambda f: edit_tensors(f, *LORA, "more"), "has what the model has not: .*lora_Ax"),
    "LoRA shape": (lambda f: edit_tensors(f, *LORA, "shape"), r"other shapes .*lora_A.weight \(\[8, 64\] instead"),
    "LoRA values": (lambda f: edit_tensors(f, *LORA, "value"), "adapter_model.safetensors is not the one"),
    "LoRA target": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["nothing"]}'),
        "does not fit the model: Target modules",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(tuned(student("llama-gqa"), "llama-gqa"), folder)
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", BROKEN)
def test_a_refused_load_leaves_the_model_as_it_was(name: str, saved: Path, tmp_path: Path) -> None:
    damage, message = BROKEN[name]
    folder = shutil.copytree(saved, tmp_path / "copy")
    damage(folder)
    for net in (tiny_model("llama-gqa"), student("llama-gqa", DEFAULTS[1])):
        expected, before = logits(net), snapshot(net)
        error = FileNotFoundError if name.startswith("no ") and name != "no JSON" else ValueError
        with pytest.raises(error, match=message):
            load_adapter(net, folder)
        assert snapshot(net) == before
        assert torch.equal(logits(net), expected)


def test_other_models_are_refused(saved: Path, tmp_path: Path) -> None:
    other = {
        "type 'llama' with 2 layers; got 'gpt2' with 2": tiny_model("gpt2"),
        "'llama' with 3": from_config(num_hidden_layers=3),
        "layer 0 of the adapter .*'num_kv_heads': 2.*; got .*'num_kv_heads': 4": from_config(num_key_value_heads=4),
        "got .*'head_dim': 8": from_config(head_dim=8),
        "'hidden_size': 64.*'hidden_size': 32": from_config(hidden_size=32),
        "carries a PEFT adapter": tuned(student("llama-gqa"), "llama-gqa").get_base_model(),
        r"lacks layers\.0.*; has what the model has not: model\.layers\.0": tiny_model("llama-gqa").model,
    }
    for message, net in other.items():
        before = snapshot(net)
        with pytest.raises(ValueError, match=message):
            load_adapter(net, saved)
        assert snapshot(net) == before
    for wrong in (nn.Linear(2, 2), tuned(student("llama-gqa"), "llama-gqa")):
        with pytest.raises(TypeError, match=f"load_adapter takes the base model.*{type(wrong).__name__}"):
            load_adapter(wrong, saved)  # type: ignore[arg-type]


def from_config(**changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(tiny_config("llama-gqa", **changes))


def test_what_cannot_be_saved_or_merged(tmp_path: Path) -> None:
    net = tiny_model("llama-gqa")
    with pytest.raises(ValueError, match="no layer of the model is converted"):
        save_adapter(net, tmp_path / "new")
    for function in (merge_adapter, lambda wrong: save_adapter(wrong, tmp_path / "new")):
        with pytest.raises(TypeError, match="Linear"):
            function(nn.Linear(2, 2))  # type: ignore[arg-type]
    assert merge_adapter(net) is net
    inside = tuned(student("llama-gqa"), "llama-gqa", target_parameters=["effattn.key_map.weight"])
    with pytest.raises(ValueError, match=r"changes .*effattn\.key_map.*only be among its modules_to_save"):
        save_adapter(inside, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_save_is_the_old_one_or_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tuned(student("llama-gqa"), "llama-gqa", r=2)
    real, calls = os.replace, []

    def replace(*args: Any) -> None:
        calls.append(args)
        if len(calls) > limit:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr("hf_effattn.recovery.adapter_files.os.replace", replace)
    for limit in range(4):
        folder = shutil.copytree(saved, tmp_path / str(limit))
        (folder / "notes.txt").write_text("mine")
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            save_adapter(new, folder)
        assert {path.name for path in folder.iterdir()} == {path.name for path in saved.iterdir()} | {"notes.txt"}
        if limit < 2:  # only effattn.safetensors, which is the same in both, was put in place
            load_adapter(tiny_model("llama-gqa"), folder)
        else:
            with pytest.raises(ValueError, match="other shapes|is not the one"):
                load_adapter(tiny_model("llama-gqa"), folder)


def test_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kwargs: kwargs)
    pushed = push_adapter(saved, "me/adapter")
    assert calls == [(("me/adapter",), {"exist_ok": True})]
    assert pushed["folder_path"] == str(saved)
    assert {path.name for path in saved.iterdir()} == set(pushed["allow_patterns"])
    with pytest.raises(FileNotFoundError, match="effattn.json is missing"):
        push_adapter(saved.parent, "me/adapter")
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, sorted(allow_patterns)))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_adapter(tiny_model("llama-gqa"), "me/adapter")
    assert asked == [("me/adapter", sorted(pushed["allow_patterns"]))]
    assert torch.equal(logits(loaded), logits(load_adapter(tiny_model("llama-gqa"), saved)))


def test_names_that_are_nowhere(no_hub: None) -> None:
    with pytest.raises(FileNotFoundError, match="no folder 'me/adapter', and no such repository .*: offline"):
        load_adapter(tiny_model("llama-gqa"), "me/adapter")


def test_paths_that_are_nowhere() -> None:
    with pytest.raises(FileNotFoundError, match="no folder '/no/such/place', and no repository can have this name"):
        load_adapter(tiny_model("llama-gqa"), "/no/such/place")
