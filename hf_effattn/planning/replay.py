"""The layers of a model whose outputs can be kept, and given again without computing them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..targets import find_targets

BLOCK = re.compile(r"(.*\.\d+)(\.|$)")  # in a list of layers, the name of one


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
