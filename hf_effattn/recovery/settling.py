"""The best of some settings for each head of a linear layer: those with the least squared error of its output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention import LinearAttention

BIASES = (-8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0)
LARGEST = 8.0  # gain: heads that are nearly closed behind a window would ask for thousands

Option = dict[str, torch.Tensor]  # values of parameters by name, heads in their first dimension; {}: as they are


class Sums(NamedTuple):
    """Squares of what heads gave, over tokens: behind a window as functions of the option and of the bias.

    Args:
        size: ‖y‖² of what was wanted, `[H]`.
        error: ‖y − o‖² with the gain as it is `[options, biases, H]`.
        slope: ⟨y − o, ∂o/∂g⟩ for the gain g; square: ‖∂o/∂g‖²; both `[options, biases, H]`, zero without a gain.
    """

    size: torch.Tensor
    error: torch.Tensor
    slope: torch.Tensor
    square: torch.Tensor


class Settled(NamedTuple):
    """What was chosen: squared errors of query heads over ‖y‖² `[H]`, before and after, and the options `[G]`."""

    before: torch.Tensor
    after: torch.Tensor
    option: torch.Tensor


def free(mechanism: LinearAttention) -> dict[str, torch.Tensor]:
    """Return the parameters of a mechanism that may be set, by name: those that are not frozen."""
    return {name: p for name, p in mechanism.named_parameters() if p.requires_grad}


def biases(mechanism: LinearAttention) -> list[torch.Tensor | None]:
    """Return the biases to try: that of now (None), and behind a window nine that open the linear part further."""
    bias = free(mechanism).get("bias")
    return [None] if bias is None else [None, *(torch.full_like(bias, x) for x in BIASES)]


def measure(mechanism: LinearAttention, options: list[Option], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sums:
    """Return what the heads give with each option and bias, against softmax attention; parameters stay as they are.

    Args:
        options: The first of them empty; args and kwargs: what the mechanism is called with.
    """
    query, key, value = args
    wanted = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=kwargs["scale"], enable_gqa=True
    ).float()
    parameters = free(mechanism)
    names = {"bias", "recurrence.gain", *options[-1]} & parameters.keys()
    kept = {name: parameters[name].clone() for name in names}
    gain = parameters.get("recurrence.gain")
    found = []
    for option in options:
        for bias in biases(mechanism):
            tried = option if bias is None else {**option, "bias": bias}
            put(mechanism, {**kept, **tried})
            output = mechanism(*args, **kwargs).float()
            change = torch.zeros_like(output)
            if gain is not None:
                gain.add_(1.0)
                change = mechanism(*args, **kwargs).float() - output
            missing = wanted - output
            products = (missing.square(), missing * change, change.square())
            found.append(torch.stack([x.sum(dim=(0, 2, 3)) for x in products]))
    put(mechanism, kept)
    sums = torch.stack(found).unflatten(0, (len(options), -1))  # [options, biases, 3, H]
    return Sums(wanted.square().sum(dim=(0, 2, 3)), *sums.unbind(dim=2))


def put(mechanism: LinearAttention, values: Option) -> None:
    """Give parameters these values."""
    for name, value in values.items():
        mechanism.get_parameter(name).copy_(value)


def least_squares(gain: torch.Tensor, sums: Sums) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gains `[options, biases, H]` with the least squared error, and this error.

    The output is linear in the gain, so `g + ⟨y − o, ∂o/∂g⟩/‖∂o/∂g‖²` has it; without a window this is `⟨y, o⟩/⟨o, o⟩`
    of the output with gain 1 (the scale of least squares, as of XNOR-Net, Rastegari 2016, arXiv 1603.05279). It gets no
    larger than `LARGEST`, on either side.

    Args:
        gain: As it is, `[H]`.
    """
    largest = gain.abs().clamp(min=LARGEST)
    best = gain + torch.where(sums.square > 0, sums.slope / sums.square, 0.0)
    best = best.clamp(-largest, largest)
    change = best - gain
    return best, sums.error - 2 * change * sums.slope + change.square() * sums.square


def settle(mechanism: LinearAttention, options: list[Option], sums: Sums) -> Settled:
    """Set the parameters of each key/value head to the option with the least error among those with which none of its
    query heads is worse than before, each query head's bias and gain to the best, and say so. Of equals the first is
    taken.

    Args:
        options: As in `measure`, the first of them empty; all others of the same parameters.
    """
    parameters, heads, groups = free(mechanism), mechanism.geometry.num_heads, mechanism.geometry.num_kv_heads
    old = parameters["recurrence.gain"].float() if "recurrence.gain" in parameters else sums.size.new_zeros(heads)
    gains, errors = least_squares(old, sums)
    best = errors.nan_to_num(torch.inf).min(dim=1)  # over biases: [options, H]
    worse = best.values > sums.error[0, 0]  # with option 0 never, as the bias and gain of before are among its own
    totals = best.values.masked_fill(worse, torch.inf).unflatten(1, (groups, -1)).sum(dim=-1)
    option = totals.argmin(dim=0)  # [G]
    every = torch.arange(heads, device=option.device)
    chosen = option.repeat_interleave(heads // groups)
    bias = best.indices[chosen, every]
    values = {name: torch.stack([o.get(name, parameters[name]) for o in options]) for name in options[-1]}
    for name, tried in values.items():
        rows = tried.shape[1]
        put(
            mechanism, {name: tried[option.repeat_interleave(rows // groups), torch.arange(rows, device=option.device)]}
        )
    if "bias" in parameters:
        tried = torch.stack([parameters["bias"] if x is None else x for x in biases(mechanism)])
        put(mechanism, {"bias": tried[bias, every]})
    if "recurrence.gain" in parameters:
        put(mechanism, {"recurrence.gain": gains[chosen, bias, every]})
    size = sums.size.clamp(min=torch.finfo(torch.float32).tiny)
    return Settled(sums.error[0, 0] / size, errors[chosen, bias, every].clamp(min=0.0) / size, option)
