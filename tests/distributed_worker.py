"""What test_distributed.py runs in other processes.

Each case of a job becomes FOLDER/<name>.pt: losses of all steps, gradients of the first, parameters after the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from matrix import DEFAULTS, ONE_CASE_EACH, Case, shake, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training import student
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_effattn.evictions import EVICTIONS

NUM_PROCESSES = 2
NUM_STEPS = 3
ROWS = 4  # of one step, over all processes
LENGTH = 24
STOP_AT = 7  # the step at which the process that is going to be killed waits for it
CASES = [(model, case) for model in ("llama-gqa", "gpt2") for case in DEFAULTS]
READS_HIDDEN = Case("gla", "linear", {"recurrence": "gla", "window": 8, "num_sinks": 2})
ZERO_CASES = [*CASES, ("llama-gqa", READS_HIDDEN)]
ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
SHARED_OUT = [
    *ONE_CASE_EACH,
    *(Case(name, "sparse", {"eviction": name, "capacity": 12}) for name in EVICTIONS),
    Case("rolling", "sparse", {"window": 6, "num_sinks": 2, "position_mode": "rolling"}),
]
WHOLE_HEADS = ("olmo2", "phi3", "deepseek_v3")  # whose plans leave all heads in all processes
UNEVEN = Case("uneven", "linear", {"window": 16, "num_sinks": 2})  # some texts leave the window, some do not
Outcome = dict[str, Any]


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def steps() -> torch.Tensor:
    """Texts `[NUM_STEPS, ROWS, LENGTH]`; each process trains on its part of the rows of a step."""
    return tokens(NUM_STEPS, ROWS, LENGTH, seed=3)


def uneven_steps(rank: int) -> list[torch.Tensor]:
    """Texts that stay within the window in one process and leave it in the other, then in none, then in both."""
    lengths = [(12, 30), (12, 12), (30, 30)]
    return [tokens(2, lengths[step][rank], seed=10 * step + rank) for step in range(NUM_STEPS)]


def train(net: nn.Module, batches: Iterable[list[torch.Tensor]], distributed: bool = True) -> Outcome:
    """Step once for each batch; the loss is the mean over its parts, of which a process usually has one."""
    optimizer = optimizer_of(net)
    outcome: Outcome = {"losses": []}
    for batch in batches:
        optimizer.zero_grad()
        loss = torch.stack([net(part, labels=part, use_cache=False).loss for part in batch]).mean()
        loss.backward()
        outcome.setdefault("gradients", {name: whole(p.grad) for name, p in inner(net).named_parameters()})
        optimizer.step()
        outcome["losses"].append(average(loss.detach()) if distributed else loss.detach())
    outcome["parameters"] = {name: whole(p) for name, p in inner(net).named_parameters()}
    return outcome


def inner(net: nn.Module) -> nn.Module:
    return net.module if isinstance(net, DistributedDataParallel) else net  # type: ignore[return-value]


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def assert_sharded(net: nn.Module, expected: bool) -> None:
    """Every parameter, also those of mechanisms, is split over the processes, or none is."""
    assert all(isinstance(parameter, DTensor) == expected for parameter in net.parameters())


def average(loss: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(loss)
    return loss / NUM_PROCESSES


def shard(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    base = net.base_model
    for layer in getattr(base, "layers", None) or base.h:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": shard}


def torch_job(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, wrap in WRAPPERS.items():
        for model, case in CASES:
            share = [[batch.chunk(NUM_PROCESSES)[dist.get_rank()]] for batch in steps()]
            net = wrap(student(model, case))
            assert_sharded(net, name == "fsdp2")
            write(folder, f"{name}-{model}-{case}", train(net, share))


def uneven_job(name: str, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    for model in ("llama-gqa", "gpt2"):
        share = [[batch] for batch in uneven_steps(dist.get_rank())]
        write(folder, f"{name}-{model}-{UNEVEN}", train(WRAPPERS[name](student(model, UNEVEN)), share))


def allow_fsdp_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Do what accelerate does for GPUs; on CPUs it takes the plugin and makes DDP of it, without a word."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def accelerate_job(name: str, folder: Path) -> None:
    """Accelerate in two processes, the rows of a step coming one at a time: gradients accumulate over two."""
    for model, case in CASES:
        plugin = None
        if name == "fsdp2":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
            )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=ROWS // NUM_PROCESSES)
        assert accelerator.num_processes == NUM_PROCESSES
        if plugin is not None:
            allow_fsdp_on_cpu(accelerator, plugin)
        net = student(model, case)
        loader = DataLoader(list(steps().flatten(0, 1)), batch_size=1)  # type: ignore[arg-type]
        net, optimizer, loader = accelerator.prepare(net, optimizer_of(net), loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(net):
                loss = net(batch, labels=batch, use_cache=False).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(average(loss.detach()))
        assert_sharded(net, name == "fsdp2")
        parameters = {key: whole(p) for key, p in inner(net).named_parameters()}
        write(folder, f"{name}-{model}-{case}", {"losses": losses, "parameters": parameters})
        accelerator.unwrap_model(net).save_pretrained(
            folder / f"{name}-{model}-{case}",
            state_dict=accelerator.get_state_dict(net),
            is_main_process=accelerator.is_main_process,
        )


def rows_with_gaps(number: int) -> list[dict[str, torch.Tensor]]:
    """Rows with different numbers of labels, so that a mean of means would be wrong."""
    rows = []
    for index, row in enumerate(tokens(number, LENGTH, seed=5)):
        labels = row.clone()
        labels[: 3 * (index % 5)] = -100
        rows.append({"input_ids": row, "labels": labels})
    return rows


def trainer(net: Any, folder: Path, num_rows: int = NUM_STEPS * ROWS, **options: Any) -> Trainer:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": NUM_STEPS,
    }
    return Trainer(net, TrainingArguments(**{**common, **options}), train_dataset=rows_with_gaps(num_rows))  # type: ignore[arg-type]


def losses_of(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trainer_job(folder: Path) -> None:
    for model, case in CASES:
        run = trainer(student(model, case), folder, per_device_train_batch_size=1, gradient_accumulation_steps=2)
        assert run.args.world_size == NUM_PROCESSES
        run.train()
        parameters = {name: whole(p) for name, p in run.model.named_parameters()}
        write(folder, f"trainer-{model}-{case}", {"losses": losses_of(run), "parameters": parameters})


def zero_job(folder: Path) -> None:
    """DeepSpeed's ZeRO-3: each process has its part of every parameter, and gathers those that a module needs."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(NUM_PROCESSES))
    import deepspeed

    students = [student(model, case) for model, case in ZERO_CASES]  # once it trains, new models come in parts, too
    for (model, case), net in zip(ZERO_CASES, students, strict=True):
        options: dict[str, Any] = {"gradient_accumulation_steps": 2, "deepspeed": ZERO_3}
        run = trainer(net, folder, per_device_train_batch_size=1, **options)
        run.train()
        parameters = dict(run.model.named_parameters())
        assert all(parameter.numel() == 0 for parameter in parameters.values())
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            gathered = {name: whole(parameter) for name, parameter in parameters.items()}
        write(folder, f"zero-{model}-{case}", {"losses": losses_of(run), "parameters": gathered})


def shareable(case: Case | None = None, family: str = "llama") -> Any:
    """A tiny model, dense or converted, whose vocabulary can be shared out, too."""
    torch.manual_seed(1)
    net = AutoModelForCausalLM.from_config(families.tiny_config(family, vocab_size=98))
    return net if case is None else shake(net.convert_attention(case.mechanism, **case.options))


def tensor_parallel_job(folder: Path) -> None:
    """Tensor parallelism: each process has half of the heads of converted models, which come from folders."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in SHARED_OUT:
        source = folder / case.name
        if dist.get_rank() == 0:
            shareable(case).save_pretrained(source)
        dist.barrier()
        try:
            net = AutoModelForCausalLM.from_pretrained(source, tp_plan="auto")
        except ValueError as error:
            write(folder, case.name, {"refused": str(error)})
            continue
        learned = [p for layer in net.model.layers for p in layer.self_attn.effattn.parameters()]
        assert all(p.to_local().shape[0] == p.shape[0] // NUM_PROCESSES for p in learned)
        write(folder, case.name, results_of(net, steps()[0]))
        net.save_pretrained(folder / f"{case.name} again", is_main_process=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        shareable().save_pretrained(folder / "dense")
        for family in WHOLE_HEADS:
            shareable(DEFAULTS[0], family).save_pretrained(folder / family)
            shareable(None, family).save_pretrained(folder / f"{family} dense")
    dist.barrier()
    for family in WHOLE_HEADS:
        net = AutoModelForCausalLM.from_pretrained(folder / family, tp_plan="auto")
        write(folder, f"{family} loaded", results_of(net, steps()[0]))
        net = AutoModelForCausalLM.from_pretrained(folder / f"{family} dense", tp_plan="auto")
        shake(net.convert_attention(DEFAULTS[0].mechanism, **DEFAULTS[0].options))
        write(folder, f"{family} later", results_of(net, steps()[0]))
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", tp_plan="auto")
    with pytest.raises(ValueError, match="cannot be shared out by tensor parallelism"):
        dense.convert_attention("sparse", pattern="bigbird")
    assert dense.config.model_type == "llama"  # nothing has happened to it
    for case in DEFAULTS:  # converted as they are, with half of the heads, and reverted
        write(folder, f"{case} later", results_of(dense.convert_attention(case.mechanism, **case.options), steps()[0]))
        dense.zero_grad()
        write(folder, f"{case} reverted", results_of(dense.revert_attention(), steps()[0]))
        dense.zero_grad()


def results_of(net: Any, ids: torch.Tensor) -> Outcome:
    """Gradients, logits and generated tokens of a model."""
    logits = net.train()(ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    outcome = {"logits": logits.detach(), "gradients": {name: whole(p.grad) for name, p in net.named_parameters()}}
    return outcome | {"generated": net.eval().generate(ids, max_new_tokens=8, do_sample=False)}


def long_run(model: str, case: Case, folder: Path) -> Trainer:
    """Two epochs of eight steps with dropout and AdamW; the checkpoints are in the middle of epochs."""
    return trainer(
        student(model, case, dropout=True),
        folder,
        num_rows=16,
        per_device_train_batch_size=2,
        max_steps=16,
        save_strategy="steps",
        save_steps=5,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
    )


class Announce(TrainerCallback):
    """Waits when step `STOP_AT` is done."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP_AT:
            self.wait()


def interrupted_job(model: str, name: str, folder: Path, wait: Callable[[], None]) -> None:
    run = long_run(model, next(case for case in DEFAULTS if case.name == name), folder)
    run.add_callback(Announce(wait))
    run.train()


def resumed_job(model: str, name: str, folder: Path) -> None:
    run = long_run(model, next(case for case in DEFAULTS if case.name == name), folder)
    run.train(resume_from_checkpoint=True)
    torch.save({"losses": losses_of(run), "parameters": dict(run.model.named_parameters())}, folder / "resumed.pt")


def write(folder: Path, name: str, outcome: Outcome) -> None:
    if dist.get_rank() == 0:
        torch.save(outcome, folder / f"{name}.pt")


JOBS = {
    "torch": torch_job,
    "uneven": uneven_job,
    "accelerate": accelerate_job,
    "trainer": trainer_job,
    "zero": zero_job,
    "tensor_parallel": tensor_parallel_job,
}


def in_one_of_many(job: str, *arguments: Any) -> None:
    """Do a job in a process that knows of others."""
    JOBS[job](*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
