"""PEFT: LoRA and its variants, adapters of saved folders, prompts and prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from matrix import DEFAULTS, Case, close, tokens, with_fitting_peft
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from training import student, train, without_dropout
from transformers import AutoModelForCausalLM

from hf_effattn.integration import is_learned

on_two_models = pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)
IDS = tokens(2, 24)
LORA: dict[str, dict[str, Any]] = {
    "default": {},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "dora-all-linear": {"use_dora": True, "target_modules": "all-linear"},
    "rank-stabilised": {"use_rslora": True, "lora_dropout": 0.1},
}
OTHERS: dict[str, Any] = {
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prompt-encoder": lambda: PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=8, encoder_dropout=0.0, task_type="CAUSAL_LM"
    ),
}


def lora(net: Any, **options: Any) -> PeftModel:
    learned = ["effattn"] if any(".effattn." in name for name, _ in net.named_parameters()) else None
    return get_peft_model(net, LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=learned, **options))


@pytest.mark.parametrize("kind", LORA)
@defaults
@on_two_models
def test_lora_variants_train_save_load_and_merge(model: str, case: Case, kind: str, tmp_path: Path) -> None:
    tuned = lora(student(model, case), **LORA[kind])
    assert not any(".effattn." in name and "lora_" in name for name, _ in tuned.named_parameters())
    before = tuned.eval()(IDS).logits
    close(before, student(model, case).eval()(IDS).logits)  # a new adapter changes nothing
    expected = train(tuned, IDS)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(student(model, case), tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, expected)
    merged = tuned.merge_and_unload()
    close(merged(IDS).logits, expected, 1e-4)
    assert {type(module).__module__.partition(".")[0] for module in merged.modules()} & {"peft"} == set()
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(IDS).logits, merged(IDS).logits)
    assert str(loaded.attention_report()) == str(merged.attention_report())


@defaults
@on_two_models
def test_an_adapter_finds_its_converted_base(model: str, case: Case, tmp_path: Path) -> None:
    student(model, case).save_pretrained(tmp_path / "base")
    tuned = without_dropout(lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    expected = train(tuned, IDS)
    tuned.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, expected)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    generated = again.generate(input_ids=IDS, **options)
    assert torch.equal(generated, tuned.generate(input_ids=IDS, **options))
    assert torch.equal(generated, again.generate(input_ids=IDS, use_cache=False, **options))
    if Version(transformers.__version__) < Version("5.18") and any(map(is_learned, again.state_dict())):
        with pytest.raises(ValueError, match="its config does not know"):  # modules of an adapter's own
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        return
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(through_transformers(IDS).logits, expected)


@on_two_models
def test_adapters_with_own_feature_maps_are_switched(model: str, tmp_path: Path) -> None:
    """Two adapters over one converted model: each has its feature maps, none has the base's."""
    case = DEFAULTS[0]
    folders = []
    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        tuned = lora(student(model, case))
        expected.append(train(tuned, IDS, steps=3 + seed))
        folders.append(tmp_path / str(seed))
        tuned.save_pretrained(folders[-1])
    net = PeftModel.from_pretrained(student(model, case), folders[0], adapter_name="first").eval()
    net.load_adapter(folders[1], adapter_name="second")
    for name, logits in (("second", expected[1]), ("first", expected[0])):
        net.set_adapter(name)
        assert torch.equal(net(IDS).logits, logits)
    with net.disable_adapter():
        assert torch.equal(net(IDS).logits, student(model, case).eval()(IDS).logits)


@with_fitting_peft
@pytest.mark.parametrize("kind", OTHERS)
@defaults
@on_two_models
def test_other_methods_train_generate_and_come_back(model: str, case: Case, kind: str, tmp_path: Path) -> None:
    tuned = get_peft_model(student(model, case), OTHERS[kind]())
    expected = train(tuned, IDS)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    generated = tuned.generate(input_ids=IDS, **options)
    ids = IDS
    for _ in range(6):
        ids = torch.cat((ids, tuned(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(generated, ids)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(student(model, case), tmp_path).eval()
    assert torch.equal(again(IDS).logits, expected)


@with_fitting_peft
@pytest.mark.parametrize("layers", [[1], None], ids=["mixed", "all"])
@defaults
@on_two_models
def test_a_learned_prefix_trains_generates_and_comes_back(
    model: str, case: Case, layers: list[int] | None, tmp_path: Path
) -> None:
    """Its keys and values stand before the text in the cache, where the state takes them over."""
    tuned = get_peft_model(
        student(model, case, layers), PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    )
    expected = train(tuned, IDS)
    assert not torch.allclose(expected, student(model, case, layers).eval()(IDS).logits, atol=1e-3)
    ids = IDS
    for _ in range(6):
        ids = torch.cat((ids, tuned(ids).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(tuned.generate(input_ids=IDS, max_new_tokens=6, do_sample=False), ids)
    tuned.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(student(model, case, layers), tmp_path).eval()(IDS).logits, expected)
