"""Calibration of converted layers on a few documents, without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention import HybridAttention
from .teacher import converted_layers, mechanism_of
from .transfer import mechanism_call, watched

BIASES = (-8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0)


@torch.no_grad()
def calibrate(student: Any, batches: Iterable[torch.Tensor]) -> dict[int, list[float]]:
    """Set the bias of each head of linear layers with a window to the one, of nine, with the least squared error of the
    head's output against softmax attention, on the hidden states of the teacher. It opens the linear part as far as
    it does good with the feature maps as they are.

    Args:
        student: A converted model.
        batches: A few `[B, T]` of token ids, without padding, longer than the windows.

    Returns:
        The biases by layer.
    """
    layers = {i: m for i, m in converted_layers(student).items() if isinstance(mechanism_of(m), HybridAttention)}
    errors: dict[int, torch.Tensor] = {}
    for batch in batches:
        for index, seen in watched(student, batch, list(layers)).items():
            inputs = mechanism_call(layers[index], seen)
            errors[index] = errors.get(index, 0.0) + _errors(mechanism_of(layers[index]), *inputs)
    chosen = {}
    for index, error in errors.items():
        bias = mechanism_of(layers[index]).bias
        bias.copy_(torch.tensor(BIASES, device=bias.device)[error.argmin(dim=0)])
        chosen[index] = bias.float().tolist()
    return chosen


def _errors(mechanism: HybridAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the squared error of each head for each of the biases `[biases, H]`."""
    query, key, value = args
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scale"], enable_gqa=True)
    before, found = mechanism.bias.clone(), []
    for bias in BIASES:
        mechanism.bias.fill_(bias)
        output = mechanism(*args, **kwargs)
        found.append((output - wanted).float().square().sum(dim=(0, 2, 3)))
    mechanism.bias.copy_(before)
    return torch.stack(found)
