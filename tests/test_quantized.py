"""Quantised linears around converted attention: what conversion adds stays float, and all ways there meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import DEFAULTS, Case, close, shake, tiny_config, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

IDS = tokens(2, 24)
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)


def bitsandbytes(**options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def torchao() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


KINDS: dict[str, Callable[[], Any]] = {
    "bitsandbytes 4 bit": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes 8 bit": lambda: bitsandbytes(load_in_8bit=True),
    "torchao int8": torchao,
}
QUANTIZED = [(model, kind) for model in ("llama-gqa", "gpt2") for kind in KINDS]
QUANTIZED.remove(("gpt2", "torchao int8"))  # torchao quantises nn.Linear only, and GPT-2's layers are Conv1D
quantized = pytest.mark.parametrize(("model", "kind"), QUANTIZED, ids=[f"{m}-{k}" for m, k in QUANTIZED])
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore::DeprecationWarning", "ignore::FutureWarning")


def original(model: str) -> Any:
    """A tiny model whose linears have sizes that the kernels of bitsandbytes take."""
    config = tiny_config(model)
    config.intermediate_size = 64
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options).eval()


def convert(net: Any, case: Case) -> Any:
    return shake(net.convert_attention(case.mechanism, **case.options))


def assert_generates(net: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    cached = net.generate(IDS, output_logits=True, return_dict_in_generate=True, **options)
    whole = net(cached.sequences, use_cache=False).logits[:, IDS.shape[1] - 1 : -1]
    close(torch.stack(cached.logits, dim=1), whole, 1e-3)


@quantized
@defaults
@torch.no_grad()
def test_converting_a_quantised_model_is_quantising_a_converted_one(
    model: str, case: Case, kind: str, tmp_path: Path
) -> None:
    config = KINDS[kind]()
    original(model).save_pretrained(tmp_path / "dense")
    net = convert(load(tmp_path / "dense", quantization_config=config), case)
    converted = convert(original(model), case)
    converted.save_pretrained(tmp_path / "converted")
    loaded = load(tmp_path / "converted", quantization_config=KINDS[kind]())
    assert torch.equal(loaded(IDS).logits, net(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, converted(IDS).logits)
    expected = {name: p for name, p in converted.named_parameters() if ".effattn." in name}
    for other in (net, loaded):
        found = {name: p for name, p in other.named_parameters() if ".effattn." in name}
        assert found.keys() == expected.keys()
        assert all(torch.equal(p, expected[name]) and p.dtype == torch.float32 for name, p in found.items())
        assert_generates(other)


@quantized
@defaults
@torch.no_grad()
def test_a_quantised_conversion_saves_loads_and_reverts(model: str, case: Case, kind: str, tmp_path: Path) -> None:
    original(model).save_pretrained(tmp_path / "dense")
    dense, net = (load(tmp_path / "dense", quantization_config=KINDS[kind]()) for _ in range(2))
    convert(net, case).save_pretrained(tmp_path / "converted")  # before it runs: bitsandbytes then repacks for the CPU
    loaded = load(tmp_path / "converted")
    assert torch.equal(loaded(IDS).logits, net(IDS).logits)
    assert str(loaded.attention_report()) == str(net.attention_report())
    assert torch.equal(loaded.revert_attention()(IDS).logits, dense(IDS).logits)


@quantized
@torch.no_grad()
def test_within_the_window_a_quantised_conversion_changes_nothing(model: str, kind: str, tmp_path: Path) -> None:
    original(model).save_pretrained(tmp_path)
    dense = load(tmp_path, quantization_config=KINDS[kind]())
    expected = dense(IDS).logits
    for mechanism in ("linear", "sparse"):
        close(dense.convert_attention(mechanism, window=32)(IDS).logits, expected, 1e-2)


@pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
@defaults
@torch.no_grad()
def test_dynamic_quantisation_by_pytorch_comes_before_or_after(model: str, case: Case) -> None:
    """Its linears have no parameters at all, so a converted layer learns dtype and device elsewhere."""
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch does not quantise dynamically")
    linears = {torch.nn.Linear}
    after = quantize(convert(original(model), case), linears)
    before = convert(quantize(original(model), linears), case)
    assert torch.equal(before(IDS).logits, after(IDS).logits)
    assert not torch.equal(before(IDS).logits, convert(original(model), case)(IDS).logits)
    assert all(p.dtype == torch.float32 for name, p in before.named_parameters() if ".effattn." in name)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(before.generate(IDS, **options), after.generate(IDS, **options))
