"""What a model loses if single layers, or single heads of them, are changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..architectures import head_counts
from ..cache import with_cache
from ..config import config_from_dict
from ..convert import convert_attention, revert_attention
from ..plans import Loss
from ..plans.heads import Unit, of_layer
from ..recovery.teacher import converted_layers, mechanism_of
from ..targets import find_targets
from .candidates import Candidate
from .probes import Batch, Probe
from .replay import Layers

PIECE = 1024  # tokens whose logits are held in float32 at a time
Choice = dict[Unit, Candidate]


def assign(model: PreTrainedModel, choice: Choice) -> None:
    """Make each layer what the choice says, and all others what they were before any conversion."""
    revert_attention(model)
    layers: dict[int, list[Candidate]] = {}
    for unit, candidate in choice.items():
        layers.setdefault(unit.layer, []).append(candidate)
    alike: dict[tuple[Candidate, ...], list[int]] = {}
    for index, candidates in layers.items():
        alike.setdefault(tuple(candidates), []).append(index)
    for heads, indices in alike.items():
        spec = of_layer([candidate.spec for candidate in heads])
        if spec is not None:
            convert_attention(model, config_from_dict(spec), layers=indices)


def logits_of(model: PreTrainedModel, probe: Probe) -> torch.Tensor:
    """Return the logits of the model as it is on one calibration text, from `probe.first` on."""
    return _logits_of(model, [probe])[0]


def inputs_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the tokens that the model reads of texts, `[B, T]`."""
    return torch.stack([probe.ids[:-1] for probe in batch]).to(model.device)


@torch.inference_mode()
def _logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    ids = inputs_of(model, batch)
    return model(ids, use_cache=False, logits_to_keep=ids.shape[1] - batch[0].first).logits


@torch.inference_mode()
def loss_of(logits: torch.Tensor, probe: Probe, dense: torch.Tensor) -> Loss:
    """Return the losses that logits have on one calibration text; NaN for those of what it has not.

    Args:
        logits: Of some model `[T, V]`.
        dense: Of the dense model `[T, V]`.
    """
    losses, divergences = [], []
    parts = (x.split(PIECE) for x in (logits, dense, probe.ids[1:].to(logits.device)))
    for own, wanted, targets in zip(*parts, strict=True):
        found, expected = (x.float().log_softmax(dim=-1) for x in (own, wanted))
        losses.append(-found.gather(1, targets[:, None])[:, 0])
        divergences.append((expected.exp() * (expected - found)).sum(dim=1))
    loss, divergence = (torch.cat(x).double().cpu() for x in (losses, divergences))
    text, recall = (float(loss[marks].mean()) for marks in (probe.is_text, probe.is_answer))
    return Loss(text, recall, float(divergence[probe.is_text].mean()))


class Past(NamedTuple):
    """What a model made of a calibration text, or of a batch of texts.

    Args:
        cache: Of the tokens before the end, all keys and values of layers that can be converted; it must be copied
            before it is used. None where converted layers cannot take over what it holds: then all is computed.
        logits: From `probe.first` on, `[T, V]`, or `[B, T, V]` of a batch.
    """

    cache: DynamicCache | None
    logits: torch.Tensor


def takes_over(model: PreTrainedModel) -> bool:
    """Whether all converted layers of the model as it is can go on from what softmax layers left."""
    return all(mechanism_of(module).takes_over for module in converted_layers(model).values())


def read(model: PreTrainedModel, probe: Probe, keeps_cache: bool = True) -> Past:
    """Let the model read a calibration text; without keeping the cache where no use is made of it."""
    if not keeps_cache:
        return Past(None, logits_of(model, probe))
    past = read_batch(model, [probe])
    return past._replace(logits=past.logits[0])


@torch.inference_mode()
def read_batch(model: PreTrainedModel, batch: Batch) -> Past:
    """Let the model read texts at once."""
    cache, ids = DynamicCache(config=model.config), inputs_of(model, batch)
    start, before = batch[0].start, batch[0].start - batch[0].first
    with _keys_kept(model) as found:
        output = model(ids[:, :start], **with_cache(model, cache), logits_to_keep=max(before, 1))
    logits = output.logits[:, :before]
    kept = copy.deepcopy(cache, {id(cache.layers[index]): layer for index, layer in found.items()})
    if not _can_be_taken_over(model, kept):
        return Past(None, _logits_of(model, batch))
    return Past(kept, torch.cat((logits, model(ids[:, start:], **with_cache(model, cache)).logits), dim=1))


@contextmanager
def _keys_kept(model: PreTrainedModel) -> Iterator[dict[int, DynamicLayer]]:
    """Keep the keys and values that converted layers attend to in the call made inside, as softmax layers do."""
    found: dict[int, DynamicLayer] = {}

    def keep(index: int, attend: Any) -> Any:
        def kept(state: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Any) -> Any:
            found[index] = DynamicLayer()
            found[index].update(key, value)
            return attend(state, query, key, value, call)

        return kept

    with ExitStack() as stack:
        for index, module in converted_layers(model).items():
            mechanism = mechanism_of(module)
            mechanism.attend = keep(index, mechanism.attend)
            stack.callback(vars(mechanism).pop, "attend")
        yield found


def _can_be_taken_over(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether the cache holds all keys and values of the layers that can be converted, and not what they are made of
    (as in latent attention), or only those in a window."""
    for index, module in find_targets(model).modules.items():
        layer: Any = cache.layers[index]
        _, heads, key_dim, value_dim = head_counts(module, model.config)[:4]
        held: list[Any] = [layer.keys, layer.values] if type(layer) is DynamicLayer else []
        if [x.shape[1::2] for x in held] != [(heads, key_dim), (heads, value_dim)]:
            return False
    return True


@torch.inference_mode()
def end_logits(model: PreTrainedModel, probe: Probe, past: Past) -> torch.Tensor:
    """Return the logits of the end of a text of which the dense model has read what is before it."""
    if past.cache is None:
        return logits_of(model, probe)[probe.start - probe.first :]
    ids = probe.ids[None, probe.start : -1].to(model.device)
    return model(ids, **with_cache(model, copy.deepcopy(past.cache))).logits[0]


def single_changes(
    model: PreTrainedModel, probe: Probe, past: Past, base: Choice, wanted: Sequence[tuple[Unit, Candidate]]
) -> Iterator[tuple[Unit, Candidate, Loss]]:
    """Yield the losses on the end of one calibration text with one unit changed, of all that are wanted, in order.

    Tokens before the end are as the dense model read them: a changed layer takes over their keys and values. Layers
    before the changed one give what they gave when `base` read the end; half of the work of whole passes.

    Args:
        probe: The text, or a part of it from its beginning on, of which nothing else is to be measured.
        past: What the dense model made of the whole text.
        base: The choice that is changed.
        wanted: The changes.
    """
    if not wanted:
        return
    layers, end = Layers(model), probe.since(probe.start)
    dense = past.logits[probe.start - probe.first : len(probe.is_text) - probe.first]
    assign(model, base)
    with layers.kept():
        end_logits(model, probe, past)
    for unit, candidate in sorted(wanted, key=lambda pair: pair[0].layer):
        assign(model, base | {unit: candidate})
        with layers.from_layer(unit.layer):
            yield unit, candidate, loss_of(end_logits(model, probe, past), end, dense)
