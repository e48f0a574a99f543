"""How far a model that is changed in many layers at once is from the dense one, on parts of calibration texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..cache import with_cache
from .gates import Gates
from .measure import Past, loss_of
from .probes import Probe

PARTS, PART = 8, 128  # of a text, and their tokens
STEEP = 4  # parts of a text that gradients are taken of
Text = tuple[Probe, Past]  # a calibration text, and what the dense model made of it


@torch.inference_mode()
def divergence(model: PreTrainedModel, texts: Sequence[Text]) -> float:
    """Return the mean divergence of parts of texts, in nats a token, each behind what the dense model read.

    Nothing has to add up here, as where layers are changed one at a time; only what the changes make of the tokens
    before is left out.

    Args:
        model: With the changes, or with gates.
        texts: And what the dense model made of each.
    """
    found = []
    for probe, past in texts:
        for part, begin, cache in _behind(probe, past):
            logits = _logits(model, part, cache)
            found.append(loss_of(logits, part, past.logits[begin : begin + len(logits)]).divergence)
    return sum(found) / len(found)


def divergence_gradient(
    model: PreTrainedModel, gates: Gates, values: torch.Tensor, texts: Sequence[Text], pasts: Sequence[Past]
) -> torch.Tensor:
    """Return the gradient in the gates of the mean divergence of parts of texts.

    Args:
        gates: Of the model.
        values: Where the gates are.
        texts: And what the dense model made of each.
        pasts: What there is before each part: what the choice, or the dense model, made of each text.
    """
    total, number = torch.zeros_like(values), 0
    for (probe, dense), past in zip(texts, pasts, strict=True):
        for part, begin, cache in _behind(probe, past, STEEP):
            with gates.at(values) as leaf:
                logits = _logits(model, part, cache)[part.is_text]
                wanted = dense.logits[begin : begin + len(part.is_text)][part.is_text]
                found, expected = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, wanted))
                loss = kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True)
            total += torch.autograd.grad(loss, leaf)[0]
            number += 1
    return total / number


def parts(probe: Probe, past: Past, number: int = PARTS) -> list[tuple[Probe, int]]:
    """Return `number` parts of a text, at even distances, and where they begin; where a cache cannot be cropped (of
    windows, or states that are native to the model), its end."""
    assert past.cache is not None
    begins = {probe.start * (2 * index + 1) // (2 * number) for index in range(number)}
    if any(type(layer) is not DynamicLayer for layer in past.cache.layers):
        begins = {probe.start}
    stop = int(probe.is_text.nonzero().max()) + 1
    found = []
    for begin in sorted(begins):
        own = slice(begin, min(begin + PART, stop))
        if bool(probe.is_text[own].any()):
            part = Probe(probe.ids[own.start : own.stop + 1], probe.is_text[own], probe.is_answer[own], 0)
            found.append((part, begin))
    return found


def _behind(probe: Probe, past: Past, number: int = PARTS) -> Iterator[tuple[Probe, int, Any]]:
    """Yield parts of a text, where they begin, and a cache of what is before them."""
    for part, begin in parts(probe, past, number):
        cache: Any = copy.deepcopy(past.cache)
        if begin < probe.start:  # states that are native to the model cannot be cropped
            cache.crop(begin - probe.start)
        yield part, begin, cache


def _logits(model: PreTrainedModel, part: Probe, cache: Any) -> torch.Tensor:
    return model(part.ids[None, :-1].to(model.device), **with_cache(model, cache)).logits[0]
