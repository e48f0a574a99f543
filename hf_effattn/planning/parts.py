"""How far a model that is changed in many layers at once is from the dense one, on parts of calibration texts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .measure import Past, loss_of
from .probes import Probe

PARTS, PART = 8, 128  # of a text, and their tokens


@torch.inference_mode()
def divergence(model: PreTrainedModel, texts: Sequence[tuple[Probe, Past]]) -> float:
    """Return the mean divergence of parts of texts, in nats a token, each behind what the dense model read.

    Nothing has to add up here, as where layers are changed one at a time; only what the changes make of the tokens
    before is left out.

    Args:
        model: With the changes, or with gates.
        texts: And what the dense model made of each.
    """
    found = []
    for probe, past in texts:
        for part, begin in parts(probe, past):
            cache: Any = copy.deepcopy(past.cache)
            cache.crop(begin - probe.start)
            logits = model(part.ids[None, :-1].to(model.device), past_key_values=cache).logits[0]
            found.append(loss_of(logits, part, past.logits[begin : begin + len(logits)]).divergence)
    return sum(found) / len(found)


def parts(probe: Probe, past: Past) -> list[tuple[Probe, int]]:
    """Return parts of a text, at even distances, and where they begin; where a cache cannot be cropped (of windows, or
    states that are native to the model), its end."""
    assert past.cache is not None
    begins = {probe.start * (2 * number + 1) // (2 * PARTS) for number in range(PARTS)}
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
