"""Configs of recipes: a dataclass, read from YAML and the command line."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import models
import yaml

Config = TypeVar("Config")
ADAPTER_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What all recipes have; their own docstrings say what it means."""

    model: str = models.EMBEDDED
    options: dict[str, Any] = field(default_factory=dict)
    plan: str | None = None
    documents: str | list[str] | None = None
    streaming: bool = False
    lora_lr: float = 1e-4
    effattn_lr: float = 1e-3
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_mlp: bool = False
    warmup: float = 0.05
    max_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    validate_every: int = 100
    held_out: int = 8
    save_every: int = 50
    resume: bool = True
    trackers: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RecipeConfig):
    """How a model is converted and recovered.

    model: a Hub id or folder; mechanism, options: of convert_attention, such as options.window=64; plan: a file that
    Plan.save wrote, instead of them
    documents: a file or folder, or several that are read in turn (null: Python's documents, and novels);
    streaming: read one .jsonl file as needed
    lengths: tokens of a window, each for as many steps of distillation as the others; transfer has the first
    batch_size: windows of a step, in all processes; micro_batch_size: windows that one computes at a time
    calibration: windows of text to calibrate on; transfer_steps, transfer_lr: attention transfer,
    with a softmax window of transfer_window, 0 for the linear part alone (null: that of the options)
    distill_steps, lora_lr, effattn_lr, temperature, reverse_weight: distillation, by forward KL + weight × reverse KL
    cached_logits: largest logits of the teacher to keep in out/teacher, which reads each window once (null: all, never)
    lora_rank, lora_alpha, lora_mlp: the adapter, on the projections of attention, or of all layers
    window_dropout, windows: how often the softmax window is narrowed, and to what
    warmup: part of the steps; max_norm: of gradients; bf16; gradient_checkpointing; seed
    validate_every, held_out: steps, and windows that are never trained on
    out; save_every: steps; adapter_dtype: of the adapter's files, such as bfloat16 (null: as trained)
    resume: go on from the newest checkpoint in out; trackers: such as [tensorboard]
    """

    mechanism: str = "linear"
    lengths: list[int] = field(default_factory=lambda: [512])
    batch_size: int = 4
    micro_batch_size: int = 1
    calibration: int = 4
    transfer_steps: int = 200
    transfer_lr: float = 1e-2
    transfer_window: int | None = None
    distill_steps: int = 200
    temperature: float = 1.0
    cached_logits: int | None = None
    reverse_weight: float = 0.0
    window_dropout: float = 0.5
    windows: list[int] = field(default_factory=lambda: [0, 1, 8, 16])
    adapter_dtype: str | None = None
    out: str = "recover_output"

    def __post_init__(self) -> None:
        if self.adapter_dtype not in (None, *ADAPTER_DTYPES):
            raise ValueError(f"adapter_dtype={self.adapter_dtype!r}; valid: {', '.join(ADAPTER_DTYPES)} or null")
        if self.cached_logits is not None and self.reverse_weight:
            raise ValueError(
                f"reverse_weight={self.reverse_weight} takes all logits, cached_logits={self.cached_logits} keeps the "
                "largest; valid: reverse_weight=0 or cached_logits=null"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RecipeConfig):
    """How a model is fine-tuned.

    model: a Hub id or folder; adapter: what save_adapter wrote, to go on with; else mechanism (null: dense) and options
    of convert_attention, such as options.window=64, or plan: a file that Plan.save wrote
    documents: a file or folder, or several that are read in turn (null: Python's documents, and novels);
    streaming: read one .jsonl file as needed
    length: tokens of a window; steps; batch_size: windows of a process at a time; accumulation: of those, to a step
    lora_lr, effattn_lr, warmup (part of the steps), max_norm
    lora_rank, lora_alpha, lora_dropout, lora_mlp: the adapter, on the projections of attention, or of all layers
    bf16; gradient_checkpointing; seed; held_out: windows for validation; validate_every: steps
    out; save_every: steps; resume: go on from the newest checkpoint in out; trackers: such as [tensorboard]
    """

    adapter: str | None = None
    mechanism: str | None = None
    length: int = 1024
    steps: int = 200
    batch_size: int = 1
    accumulation: int = 4
    lora_dropout: float = 0.0
    out: str = "finetune_output"


def read_config(kind: type[Config], arguments: Sequence[str]) -> Config:
    """Return a config out of a command's arguments: `--config FILE` and `key=value`, or `key.option=value` where the
    value is a mapping. Later ones win. Values are YAML.

    Raises:
        SystemExit: after printing the fields, for `--help`.
        ValueError: for unknown keys, and values of another type than the field's.
    """
    if set(arguments) & {"-h", "--help"}:
        print(f"--config FILE.yaml key=value …\n\n{kind.__doc__}")
        raise SystemExit
    given: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--config" and rest:
            given |= yaml.safe_load(Path(rest.pop(0)).read_text(encoding="utf-8")) or {}
            continue
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            raise ValueError(f"arguments are --config FILE and key=value; got {argument!r}")
        key, _, option = key.partition(".")
        given[key] = {**(given.get(key) or {}), option: yaml.safe_load(value)} if option else yaml.safe_load(value)
    hints = typing.get_type_hints(kind)
    unknown = [key for key in given if key not in hints]
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}; valid: {', '.join(hints)}")
    return kind(**{key: fitted(key, value, hints[key]) for key, value in given.items()})


def fitted(key: str, value: Any, hint: Any) -> Any:
    """Return the value of a field as its type says; numbers such as 1e-4, which YAML takes for text, are floats."""
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [typing.get_origin(one) or one for one in hints]
    if float in plain and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if not any(isinstance(value, one) and (one is bool or not isinstance(value, bool)) for one in plain):
        raise ValueError(f"{key} is {getattr(hint, '__name__', hint)}; got {value!r}")
    return value
