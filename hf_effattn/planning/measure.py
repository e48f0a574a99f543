"""What a model loses if single layers are changed: computed from the layer on, those before it being known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..convert import convert_attention, revert_attention
from ..plans import Loss
from ..targets import find_targets
from .candidates import Candidate
from .probes import Probe

PIECE = 1024  # tokens whose logits are held in float32 at a time
BLOCK = re.compile(r"(.*\.\d+)(\.|$)")  # in a list of layers, the name of one


def assign(model: PreTrainedModel, choice: dict[int, Candidate]) -> None:
    """Make each layer what the choice says, and all others what they were before any conversion."""
    revert_attention(model)
    for candidate in dict.fromkeys(choice.values()):
        if candidate.config is not None:
            layers = [index for index, chosen in choice.items() if chosen == candidate]
            convert_attention(model, candidate.config, layers=layers)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, probe: Probe) -> torch.Tensor:
    """Return the logits of the model as it is on one calibration text `[T, V]`."""
    return model(probe.ids[None, :-1].to(model.device), use_cache=False).logits[0]


@torch.inference_mode()
def loss_of(logits: torch.Tensor, probe: Probe, dense: torch.Tensor) -> Loss:
    """Return the losses that logits have on one calibration text.

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


class Layers:
    """The layers of a model around its attention modules, whose outputs can be kept and given again.

    Args:
        model: A causal language model.

    Raises:
        ValueError: if the layers cannot be told apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        attentions = {id(module): index for index, module in find_targets(model).modules.items()}
        named = {attentions[id(m)]: name for name, m in model.named_modules() if id(m) in attentions}
        found = {index: BLOCK.match(name) for index, name in named.items()}
        blocks = {index: match[1] for index, match in found.items() if match}
        if len(set(blocks.values())) != len(attentions):
            raise ValueError(f"the layers of {type(model).__name__} cannot be told apart by their names")
        self.blocks: dict[int, nn.Module] = {i: model.get_submodule(name) for i, name in sorted(blocks.items())}
        self.outputs: dict[int, Any] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the output of every layer of the pass that is made inside."""
        self.outputs = {}

        def keep(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.outputs[index] = output

            return hook

        with ExitStack() as stack:
            for index, block in self.blocks.items():
                stack.callback(block.register_forward_hook(keep(index)).remove)
            yield

    @contextmanager
    def from_layer(self, first: int) -> Iterator[None]:
        """Let the layers before `first` give what they gave when it was kept, without computing anything."""
        before = [(block, index) for index, block in self.blocks.items() if index < first]
        own = {id(block): block.__dict__.get("forward") for block, _ in before}
        for block, index in before:
            block.forward = partial(_given, self.outputs[index])
        try:
            yield
        finally:
            for block, _ in before:
                del block.__dict__["forward"]
                if own[id(block)] is not None:
                    block.__dict__["forward"] = own[id(block)]


def _given(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def single_changes(
    model: PreTrainedModel,
    probe: Probe,
    dense: torch.Tensor,
    base: dict[int, Candidate],
    wanted: Sequence[tuple[int, Candidate]],
) -> Iterator[tuple[int, Candidate, Loss]]:
    """Yield the losses on one calibration text with one layer changed, of all that are wanted, the layers in order.

    What is before the layer is taken from one pass of the model as `base` has it; half of the work of whole passes.
    """
    if not wanted:
        return
    layers = Layers(model)
    assign(model, base)
    with layers.kept():
        logits_of(model, probe)
    for index, candidate in sorted(wanted, key=lambda pair: pair[0]):
        assign(model, base | {index: candidate})
        with layers.from_layer(index):
            yield index, candidate, loss_of(logits_of(model, probe), probe, dense)
