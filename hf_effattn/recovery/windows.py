"""Training with narrow windows, so that the linear part learns to carry weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..attention import HybridAttention
from ..cache import KeyValueStore
from ..notation import whole_number
from ..patterns import Retention


@contextmanager
def narrowed(model: torch.nn.Module, window: int) -> Iterator[None]:
    """Let linear layers with a window see only `window` keys and their sinks by softmax, or fewer if they have fewer;
    the linear part gets all older ones. With a window of 0 there are no sinks either: the linear part is alone.

    With gradient checkpointing the backward pass must be inside, too: it computes layers again.

    Raises:
        ValueError: if `window` is negative.
    """
    whole_number("window", window, 0)
    layers = [module for module in model.modules() if isinstance(module, HybridAttention)]
    before = [(layer.options, layer.num_sinks, layer.store) for layer in layers]
    for layer in layers:
        width = min(window, layer.options.window)
        layer.num_sinks = layer.num_sinks if width else 0
        layer.options = replace(layer.options, window=width, num_sinks=layer.num_sinks)
        layer.store = KeyValueStore(Retention(width, frozenset(range(layer.num_sinks))))
    try:
        yield
    finally:
        for layer, (options, num_sinks, store) in zip(layers, before, strict=True):
            layer.options, layer.num_sinks, layer.store = options, num_sinks, store


@dataclass(frozen=True)
class WindowDropout:
    """When to narrow windows to what: hybrids trained without it lean on the window and ignore the linear part
    (arXiv 2510.05901).

    Args:
        probability: Of a narrow window, reached after the first half of the steps from 0 on.
        windows: Narrow windows, each as likely as the others; 0 for the linear part alone.
        steps: Of the whole training.

    Raises:
        ValueError: if the probability is not between 0 and 1, or there are no windows.
    """

    probability: float
    windows: Sequence[int] = (0, 1, 8, 16)
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"a probability is between 0 and 1; got {self.probability}")
        if not self.windows or min(self.windows) < 0:
            raise ValueError(f"windows must be given, and none of them negative; got {self.windows}")

    def draw(self, step: int, generator: torch.Generator | None = None) -> int | None:
        """Return the window of a step, counted from 0; None for the full one."""
        now = self.probability * min(1.0, 2.0 * step / max(self.steps, 1))
        chance, choice = torch.rand(2, generator=generator).tolist()
        return self.windows[int(choice * len(self.windows))] if chance < now else None
