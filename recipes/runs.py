"""Training runs: their log, and checkpoints that one can go on from after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from safetensors.torch import load_file, save_file
from torch import nn

from hf_effattn.recovery.sharding import shared_as, whole

# What may change between a run and its resume:
FREE = ("out", "resume", "save_every", "validate_every", "trackers", "adapter_dtype")
TRAINED, OPTIMIZER = "trained.safetensors", "optimizer.pt"
TEACHER = "teacher"  # what is kept of its logits
WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # weights in each process


def accelerator_of(config: Any) -> Accelerator:
    """Return the accelerator of a run.

    Raises:
        ValueError: if its processes cannot share the batches, or are launched in another way than alone, DDP and FSDP2.
    """
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",
        log_with=config.trackers or None,
        project_dir=config.out,
        step_scheduler_with_optimizer=False,  # or the schedule would run faster in more processes
    )
    if accelerator.distributed_type not in WHOLE and not accelerator.is_fsdp2:
        kind = accelerator.distributed_type.value
        raise ValueError(f"distributed_type={kind}; valid: NO, MULTI_CPU, MULTI_GPU, and FSDP with fsdp_version: 2")
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size={config.batch_size} is no multiple of {accelerator.num_processes} processes")
    return accelerator


class Run:
    """The folder of a run, and the steps it has done.

    Args:
        accelerator: Of the run.
        config: A dataclass with `out`, `resume` and `trackers`. What a run has begun with, it goes on with.
        keep: Checkpoints that stay.

    Raises:
        ValueError: if there are checkpoints of another config, or a tracker is not installed.
    """

    def __init__(self, accelerator: Accelerator, config: Any, keep: int = 2) -> None:
        self.accelerator, self.config, self.folder, self.keep = accelerator, config, Path(config.out), keep
        settings = dataclasses.asdict(config)
        missing = set(config.trackers) - {str(tracker.value) for tracker in get_available_trackers()}
        if missing:
            raise ValueError(f"trackers that are not installed: {', '.join(sorted(missing))}")
        if config.resume and self.checkpoint:
            before = json.loads((self.folder / "config.json").read_text())
            other = [key for key in settings if key not in FREE and before.get(key) != settings[key]]
            if other:
                raise ValueError(
                    f"{self.folder} has checkpoints of a run with other values of {', '.join(other)}; give another "
                    "`out`, or resume=false to start over"
                )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._begin(settings, config.resume)
        accelerator.wait_for_everyone()
        accelerator.init_trackers("hf_effattn", {key: str(value) for key, value in settings.items()})

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, by step."""
        return sorted(self.folder.glob("checkpoint-*"))

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def step(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        return int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0

    def log(self, **entry: Any) -> None:
        """Add a line to log.jsonl, and its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        numbers = {f"{entry['stage']}/{key}": value for key, value in entry.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=entry["step"])

    def save(self, step: int, model: nn.Module, optimizer: Any, scheduler: Any) -> Path:
        """Save what step `step` left, under a name that only complete checkpoints have; return where.

        What is trained is saved whole, so that a run can go on in another number of processes.
        """
        partial, path = self.folder / "partial", self.folder / f"checkpoint-{step:06d}"
        tensors = {name: whole(tensor).contiguous() for name, tensor in self._trained(model).items()}
        state = optimizer.state_dict()
        slots = {number: {name: whole(x) for name, x in slot.items()} for number, slot in state["state"].items()}
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_file(tensors, partial / TRAINED)
            states = {"optimizer": {**state, "state": slots}, "scheduler": scheduler.state_dict()}
            torch.save(states, partial / OPTIMIZER)
            os.replace(partial, path)
            for old in self.checkpoints[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return path

    def load(self, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Go back to the newest checkpoint."""
        assert self.checkpoint is not None
        saved, own = load_file(self.checkpoint / TRAINED), self._trained(model)
        if saved.keys() != own.keys():
            names = ", ".join(sorted(saved.keys() ^ own.keys())[:5])
            raise ValueError(f"{self.checkpoint} is of another model: {names}")
        for name, tensor in own.items():
            tensor.copy_(shared_as(saved[name], tensor))
        states = torch.load(self.checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, slot in states["optimizer"]["state"].items():
            for name, x in slot.items():
                slot[name] = shared_as(x, parameters[number]) if x.shape == parameters[number].shape else x
        optimizer.load_state_dict(states["optimizer"])
        scheduler.load_state_dict(states["scheduler"])

    def _trained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        named = self.accelerator.unwrap_model(model).named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    def _begin(self, settings: dict[str, Any], resume: bool) -> None:
        """Make the folder, with the checkpoints and lines of the log that the run goes on from, or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [] if resume else [*self.checkpoints, self.folder / TEACHER]:
            shutil.rmtree(path, ignore_errors=True)
        log, kept = self.folder / "log.jsonl", []
        for line in log.read_text().splitlines() if log.exists() and self.checkpoint else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= self.step else []
            except json.JSONDecodeError:  # the run was killed while it wrote
                continue
        log.write_text("".join(kept))
        (self.folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
