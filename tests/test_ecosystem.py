"""What people use next to transformers takes converted models: packing collators, heads, offloading, accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from distributed_worker import NUM_STEPS, losses_of, rows_with_gaps, trainer
from matrix import DEFAULTS, MODELS, Case, close, converted_model, shake, through, tiny_config, tiny_model, tokens
from training import student
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

on_every_model = pytest.mark.parametrize("model", MODELS)
on_two_models = pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)
IDS = tokens(2, 24)
DOCUMENTS = [tokens(length, seed=length) for length in (11, 3, 17, 1, 9)]
HEADS: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "sequence": (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2])}),
    "tokens": (AutoModelForTokenClassification, {"labels": IDS % 3}),
    "questions": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([1, 5]), "end_positions": torch.tensor([3, 20])},
    ),
}


def flattened(**options: Any) -> dict[str, Any]:
    return DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in DOCUMENTS])


@defaults
@on_every_model
def test_flattened_documents_do_not_see_each_other(model: str, case: Case) -> None:
    net = converted_model(model, case)
    batch = flattened()
    alone = [net(row[None], use_cache=False).logits for row in DOCUMENTS]
    packed = net(**batch, use_cache=False)
    close(packed.logits, torch.cat(alone, dim=1))
    losses = [
        torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum")
        for logits, row in zip(alone, DOCUMENTS, strict=True)
    ]
    close(packed.loss, torch.stack(losses).sum() / sum(len(row) - 1 for row in DOCUMENTS))


@defaults
@on_every_model
def test_gradients_of_flattened_documents_are_those_of_the_documents(model: str, case: Case) -> None:
    net = student(model, case)
    weights = torch.cat([torch.randn(1, len(row), net.config.vocab_size) for row in DOCUMENTS], dim=1)
    (net(**flattened(), use_cache=False).logits * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    start = 0
    for row in DOCUMENTS:
        part = weights[:, start : start + len(row)]
        (net(row[None], use_cache=False).logits * part).sum().backward()
        start += len(row)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "beside softmax"])
@defaults
@on_every_model
def test_documents_may_be_told_as_to_flash_kernels(model: str, case: Case, layers: list[int] | None) -> None:
    """As TRL's packing does."""
    net = tiny_model(model).convert_attention(case.mechanism, layers=layers, **case.options)
    expected = net(**flattened(), use_cache=False).logits
    batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"} < batch.keys()
    assert torch.equal(net(**batch, use_cache=False).logits, expected)
    if layers is None:  # else the softmax layer goes by positions, and would see all of the row
        del batch["position_ids"]
        packed = net(**batch, use_cache=False).logits
        places = torch.arange(41).split([len(row) for row in DOCUMENTS])
        alone = [net(row[None], position_ids=at[None]).logits for row, at in zip(DOCUMENTS, places, strict=True)]
        close(packed, torch.cat(alone, dim=1))
        padded = net(**batch, attention_mask=torch.arange(41)[None] < 38, use_cache=False).logits
        close(padded[:, :38], packed[:, :38])


@defaults
@on_every_model
def test_padding_does_not_let_documents_meet(model: str, case: Case) -> None:
    """Between them, behind them, or in another row: positions of real tokens tell."""
    net, (first, second) = converted_model(model, case), (DOCUMENTS[0], DOCUMENTS[2])
    ids = torch.zeros(2, 34, dtype=torch.int64)
    positions, real = torch.ones_like(ids), torch.zeros_like(ids)
    for row, start in ((0, 11), (1, 14)):
        for document, low in ((first, 0), (second, start)):
            at = slice(low, low + len(document))
            ids[row, at], positions[row, at], real[row, at] = document, torch.arange(len(document)), 1
    logits = net(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    for document, low in ((first, 0), (second, 11)):
        close(logits[0, low : low + len(document)], net(document[None], use_cache=False).logits[0])
    close(logits[1, 14:31], logits[0, 11:28])
    one = net(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    close(net(IDS, attention_mask=mask, position_ids=torch.arange(24)[None], use_cache=False).logits[0], one[0])


@defaults
@on_two_models
def test_one_document_told_as_to_flash_kernels_may_have_a_cache(model: str, case: Case) -> None:
    net, row = converted_model(model, case), DOCUMENTS[2][None]
    ends = torch.tensor([0, row.shape[1], row.shape[1]], dtype=torch.int32)  # filled up, as some do
    told = net(row, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=True)
    plain = net(row, use_cache=True)
    assert torch.equal(told.logits, plain.logits)
    caches = (told.past_key_values, plain.past_key_values)
    assert torch.equal(*(net(row[:, :1], **through(cache)).logits for cache in caches))


@defaults
@on_two_models
def test_lengths_that_say_something_else_are_refused(model: str, case: Case) -> None:
    net, batch = converted_model(model, case), flattened()
    wrong = {
        "both be given": ([0, 11, 41], None),
        "of one dimension": (41, 41),
        "the same numbers": ([0, 11, 41], [0, 12, 41]),
        "from 0 to T = 41": ([0, 11, 40], [0, 11, 40]),
        "that grow from 0": ([0, 14, 11, 41], [0, 14, 11, 41]),
        "got \\[1, 41\\]": ([1, 41], [1, 41]),
        "elsewhere than by position_ids": ([0, 11, 31, 32, 41], [0, 11, 31, 32, 41]),
    }
    for message, given in wrong.items():
        ends = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in given]
        with pytest.raises(ValueError, match=message):
            net(**batch, cu_seq_lens_q=ends[0], cu_seq_lens_k=ends[1], use_cache=False)
    with pytest.raises(ValueError, match="as tensors"):
        net(**batch, cu_seq_lens_q=[0, 41], cu_seq_lens_k=[0, 41], use_cache=False)
    ends = torch.tensor([0, 24], dtype=torch.int32)
    with pytest.raises(ValueError, match="and 2 rows"):
        net(IDS, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)
    ends = torch.tensor([0, 7, 24], dtype=torch.int32)
    with pytest.raises(ValueError, match="use_cache=False"):
        net(IDS[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=True)


@defaults
@on_two_models
def test_trainer_takes_flattened_documents(model: str, case: Case, tmp_path: Path) -> None:
    data = [{"input_ids": row.tolist()} for row in DOCUMENTS if len(row) > 1] * 2
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=2, **options)
    net = student(model, case)
    before = net(**flattened(), use_cache=False).loss.item()
    run = Trainer(net, arguments, train_dataset=data, data_collator=DataCollatorWithFlattening())  # type: ignore[arg-type]
    run.train()
    assert net(**flattened(), use_cache=False).loss.item() < before


@pytest.mark.parametrize("head", HEADS)
@defaults
@on_two_models
def test_heads_train_save_and_load(model: str, case: Case, head: str, tmp_path: Path) -> None:
    auto, labels = HEADS[head]
    original = auto.from_config(tiny_config(model, num_labels=2 if head == "questions" else 3))
    before = {name: p.clone() for name, p in original.named_parameters()}
    net = shake(original.convert_attention(case.mechanism, **case.options)).train()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(IDS, **labels, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    optimizer.step()
    assert any(".effattn." in name for name in start) == (case.name == "linear")
    assert all(not torch.equal(p, start[name]) for name, p in net.named_parameters() if ".effattn." in name)
    net.eval().save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(loaded) is type(net)
    for actual, expected in zip(loaded.eval()(IDS, **labels).values(), net(IDS, **labels).values(), strict=False):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(actual, expected)
    assert dict(net.revert_attention().named_parameters()).keys() == before.keys()


@pytest.mark.parametrize("side", ["left", "right"])
@defaults
@on_two_models
def test_a_classifier_reads_the_last_real_token(model: str, case: Case, side: str) -> None:
    net = AutoModelForSequenceClassification.from_config(tiny_config(model, num_labels=3)).eval()
    shake(net.convert_attention(case.mechanism, **case.options))
    short = IDS[:1, :13]
    padding = torch.zeros(1, 11, dtype=torch.long)
    order = (padding, short) if side == "left" else (short, padding)
    ids = torch.cat((torch.cat(order, dim=1), IDS[1:]))
    mask = (ids > 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = net(ids, attention_mask=mask, position_ids=positions).logits
    close(logits, torch.cat((net(short).logits, net(IDS[1:]).logits)))


def split_device_map(net: Any) -> dict[str, str]:
    """The last layer on disk, everything else on the CPU."""
    base = net.base_model_prefix
    inner = {f"{base}.{name}" for name, _ in getattr(net, base).named_children()}
    layers = next(name for name in inner if name.rpartition(".")[2] in ("layers", "h"))
    outer = {name for name, _ in net.named_children()} - {base}
    places = dict.fromkeys(outer | inner - {layers}, "cpu")
    return places | {f"{layers}.0": "cpu", f"{layers}.1": "disk"}


def placed(how: str, net: Any, folder: Path) -> Any:
    """`net` loaded or spread by accelerate in one of its ways."""
    net.save_pretrained(folder)
    cpu = torch.device("cpu")
    if how == "device_map":
        return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    if how == "device_map with disk":
        places = split_device_map(net)
        return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder / "offload")
    if how == "load_checkpoint_and_dispatch":
        with accelerate.init_empty_weights():
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        empty.tie_weights()
        return accelerate.load_checkpoint_and_dispatch(empty, folder, device_map={"": "cpu"})
    if how == "dispatch_model":
        return accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    if how == "cpu_offload":
        return accelerate.cpu_offload(net, cpu)
    return accelerate.disk_offload(net, folder / "offload", cpu)


PLACES = {  # and whether weights are elsewhere between calls
    "device_map": False,
    "device_map with disk": True,
    "load_checkpoint_and_dispatch": False,
    "dispatch_model": False,
    "cpu_offload": True,
    "disk_offload": True,
}


@pytest.mark.parametrize("how", PLACES)
@defaults
@on_two_models
@torch.no_grad()
def test_placed_and_offloaded_models_give_the_same_logits(model: str, case: Case, how: str, tmp_path: Path) -> None:
    expected = converted_model(model, case)
    net = placed(how, shake(tiny_model(model).convert_attention(case.mechanism, **case.options)), tmp_path).eval()
    elsewhere = {name for name, p in net.named_parameters() if p.is_meta}
    assert bool(elsewhere) == PLACES[how]
    if elsewhere and case.name == "linear":
        assert any(".effattn." in name for name in elsewhere)
    close(net(IDS).logits, expected(IDS).logits)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(net.generate(IDS, **options), expected.generate(IDS, **options))
    assert str(net.attention_report()) == str(expected.attention_report())
    close(net.revert_attention()(IDS).logits, tiny_model(model)(IDS).logits)


@pytest.mark.slow
@defaults
@on_two_models
def test_accumulated_gradients_are_those_of_a_big_batch(model: str, case: Case, tmp_path: Path) -> None:
    runs = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        run = trainer(student(model, case), tmp_path, **options)
        run.train()
        runs.append(run)
    assert len(losses_of(runs[0])) == NUM_STEPS
    assert len({int((row["labels"] >= 0).sum()) for row in rows_with_gaps(4)}) > 1
    for run in runs[1:]:
        assert losses_of(run) == pytest.approx(losses_of(runs[0]), rel=1e-5)
        for (name, p), q in zip(run.model.named_parameters(), runs[0].model.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=name)


LIGER = """
def patch(model):
    model.is_patched = True

MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}

def _apply_liger_kernel_to_instance(model):
    if model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model)
"""
SWITCHED_ON = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import hf_effattn
sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
net = LlamaForCausalLM(LlamaConfig(**sizes)).convert_attention("sparse", window=8)
options = {"use_liger_kernel": True, "use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no"}
Trainer(net, TrainingArguments(sys.argv[1], **options), train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}]).train()
assert net.is_patched
"""


def test_the_switch_for_ligers_kernels_reaches_converted_models(tmp_path: Path) -> None:
    """Its own kernels want a GPU; this is how it finds what to patch, by the model type."""
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package / "monkey_patch.py").write_text(LIGER)
    (package / "__init__.py").write_text("from .monkey_patch import _apply_liger_kernel_to_instance")
    (package.parent / "__init__.py").touch()
    (tmp_path / "liger_kernel-0.8.5.dist-info").mkdir()
    (tmp_path / "liger_kernel-0.8.5.dist-info" / "METADATA").write_text("Name: liger-kernel\nVersion: 0.8.5\n")
    command = [sys.executable, "-c", SWITCHED_ON, str(tmp_path / "out")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
