"""Calibration of converted layers on a few documents, without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..attention import LinearAttention
from .decays import FASTEST, Far, decay_rate, far_attention
from .settling import Option, Settled, Sums, free, measure, settle
from .teacher import converted_layers, mechanism_of
from .transfer import mechanism_call, watched

BIAS, GAIN, START = "bias", "recurrence.gain", "recurrence.start"  # what is set; START is what decays start from
MULTIPLES = (1.0, 4.0, 16.0, 64.0)  # of the rate at which softmax attention looks away


class Calibrated(NamedTuple):
    """What calibration made of a layer; None for what the layer does not have, or what is frozen.

    Args:
        before, after: Squared error of each query head's output, over that of an output of zeros.
        bias, gain: Of each query head.
        decay: α of each key/value head where the layer's input adds nothing to it, the mean over features.
    """

    before: list[float]
    after: list[float]
    bias: list[float] | None = None
    gain: list[float] | None = None
    decay: list[float] | None = None


@torch.no_grad()
def calibrate(student: Any, batches: Iterable[torch.Tensor]) -> dict[int, Calibrated]:
    """Set the few numbers that each head of linear layers has to those with the least squared error of the head's
    output against softmax attention, on the hidden states of the teacher: the objective of attention transfer (LoLCATs,
    Zhang 2024, arXiv 2410.10254), without gradients.

    These are the bias of a layer with a window, of nine, so that the linear part opens as far as it does good; the gain
    of a delta rule, by least squares (`least_squares`); and a learned decay (`faster`), with the bias and the gain that
    are best with it. What is there stays where nothing is better, and no head gets worse on these texts.

    Args:
        student: A converted model. Its frozen parameters stay as they are.
        batches: A few `[B, T]` of token ids, without padding, longer than the windows.

    Returns:
        What was set, by layer, of the layers that have anything to set.
    """
    batches = list(batches)
    layers = {i: m for i, m in converted_layers(student).items() if _settable(mechanism_of(m))}
    far = _far(student, batches, {i: m for i, m in layers.items() if START in _settable(mechanism_of(m))})
    options: dict[int, list[Option]] = dict.fromkeys(layers, [{}])
    options |= {i: faster(mechanism_of(layers[i]), decay_rate(found)) for i, found in far.items()}
    settled = _best(student, batches, layers, options)
    return {i: _described(mechanism_of(layers[i]), found) for i, found in settled.items()}


def faster(mechanism: LinearAttention, rate: torch.Tensor) -> list[Option]:
    """Return settings with which a recurrence decays as it does, at the rate `[G]` at which softmax attention looks
    away (`decay_rate`), or at 4, 16 or 64 times it: a delta rule may do better as a short memory."""
    recurrence = mechanism.recurrence
    assert recurrence is not None
    rates = [(rate * multiple).clamp(max=FASTEST) for multiple in MULTIPLES]
    return [{}, *({START: recurrence.start_for(own)} for own in rates)]


def _settable(mechanism: Any) -> set[str]:
    """Return the names of what is to be set in a mechanism."""
    return {BIAS, GAIN, START} & free(mechanism).keys() if isinstance(mechanism, LinearAttention) else set()


def _far(student: Any, batches: list[torch.Tensor], layers: dict[int, nn.Module]) -> dict[int, Far]:
    """Return what softmax attention does with the keys that would be in the linear state of each layer."""
    found: dict[int, Far] = {}
    for batch in batches if layers else ():
        for index, seen in watched(student, batch, list(layers)).items():
            (query, key, _), keywords = mechanism_call(layers[index], seen)
            options = mechanism_of(layers[index]).options
            far = far_attention(query, key, keywords["scale"], options.window, options.num_sinks)
            found[index] = found[index].joined(far) if index in found else far
    return found


def _best(
    student: Any, batches: list[torch.Tensor], layers: dict[int, nn.Module], options: dict[int, list[Option]]
) -> dict[int, Settled]:
    """Set each layer to its best options."""
    found: dict[int, Sums] = {}
    for batch in batches if layers else ():
        for index, seen in watched(student, batch, list(layers)).items():
            module = layers[index]
            sums = measure(mechanism_of(module), options[index], *mechanism_call(module, seen))
            found[index] = Sums(*(a + b for a, b in zip(found[index], sums, strict=True))) if index in found else sums
    return {index: settle(mechanism_of(layers[index]), options[index], sums) for index, sums in found.items()}


def _described(mechanism: LinearAttention, settled: Settled) -> Calibrated:
    """Return what was set in a layer."""
    names = _settable(mechanism)
    bias, gain = (mechanism.get_parameter(name).tolist() if name in names else None for name in (BIAS, GAIN))
    decay = mechanism.recurrence.start_decay().tolist() if mechanism.recurrence and START in names else None
    return Calibrated(settled.before.tolist(), settled.after.tolist(), bias, gain, decay)
