"""Attention transfer: each converted layer learns to do what softmax attention does with the same input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..integration.attention import attention_weights
from .teacher import as_teacher, converted_layers, mechanism_of

KINDS = ("output", "weights")


class Seen(NamedTuple):
    """One call of an attention module of the teacher: what it was given, and its output `[B, T, ·]`."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: torch.Tensor


def transfer_losses(student: Any, input_ids: torch.Tensor, kind: str = "output") -> dict[int, torch.Tensor]:
    """Return how far each converted layer is from softmax attention, on the hidden states of the teacher.

    Layers do not see each other's mistakes. The sum is the loss of attention transfer, which trains what mechanisms
    learn: see `freeze_base` (LoLCATs, Zhang 2024, arXiv 2410.10254; Hedgehog, Zhang 2024, arXiv 2402.04347).

    Args:
        student: A converted model with whole weights: its layers are called one by one, past the hooks of FSDP2.
        input_ids: `[B, T]`, without padding.
        kind: "output" for the squared error of the layer's output over the mean square of the teacher's; "weights" for
            the KL divergence of its attention weights, which takes T² memory a head.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of attention transfer {kind!r}; valid: {', '.join(KINDS)}")
    losses = {}
    modules = converted_layers(student)
    for index, seen in watched(student, input_ids, list(modules)).items():
        if kind == "output":
            output = _first(modules[index](*seen.arguments, **seen.keywords))
            error, size = (x.float().square().sum() for x in (output - seen.output, seen.output))
            losses[index] = error / size
        else:
            losses[index] = _weights_kl(modules[index], seen)
    return losses


def watched(student: Any, input_ids: torch.Tensor, layers: list[int]) -> dict[int, Seen]:
    """Return what the attention modules of `layers` were given and gave in one pass of the teacher."""
    found: dict[int, Seen] = {}
    modules = converted_layers(student)
    with as_teacher(student), _hooks(modules, layers, found):
        student(input_ids, use_cache=False, logits_to_keep=1)
    return found


@contextmanager
def _hooks(modules: dict[int, nn.Module], layers: list[int], found: dict[int, Seen]) -> Iterator[None]:
    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # without padding a converted layer needs no mask, and that of the teacher is of another kind
            keywords = {name: None if name == "attention_mask" else value for name, value in kwargs.items()}
            found[index] = Seen(args, keywords, _first(output))

        return hook

    handles = [modules[index].register_forward_hook(watch(index), with_kwargs=True) for index in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def mechanism_call(module: nn.Module, seen: Seen) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the mechanism of `module` is called with for this input of the layer: query, key and value, and
    keywords."""
    taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    mechanism = mechanism_of(module)
    handle = mechanism.register_forward_pre_hook(lambda _, args, kwargs: taken.append((args, kwargs)), with_kwargs=True)
    try:
        module(*seen.arguments, **seen.keywords)
    finally:
        handle.remove()
    args, kwargs = taken[0]
    tensors = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))
    return tensors, {name: value for name, value in kwargs.items() if name not in ("query", "key", "value")}


def _weights_kl(module: nn.Module, seen: Seen) -> torch.Tensor:
    """Return KL(teacher's weights ‖ student's), the mean over queries and heads."""
    (query, key, value), keywords = mechanism_call(module, seen)
    attend = partial(mechanism_of(module), query, key, **keywords)
    own = attention_weights(attend, value).float().clamp(min=1e-9).log()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query.float() @ key.float().transpose(2, 3)) * keywords["scale"]
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    wanted = scores.masked_fill(hidden, -torch.inf).log_softmax(dim=-1)
    return (wanted.exp() * (wanted - own).masked_fill(hidden, 0.0)).nan_to_num(0.0).sum(dim=-1).mean()
