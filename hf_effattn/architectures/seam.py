"""The seam of an attention class: how its forward calls transformers' attention function, read from its source.

A class that looks its function up in `ALL_ATTENTION_FUNCTIONS` can be converted without knowing its family. What it
passes beside queries, keys, values and mask tells whether it does more than softmax attention: soft-capping, learned
sinks, position biases and selections of keys arrive there as keywords.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..cache import cache_argument

# Keywords of the call that converted layers honour, or whose meaning they replace (a native window).
UNDERSTOOD = frozenset({"attention_mask", "dropout", "output_attentions", "position_ids", "scaling", "sliding_window"})


@dataclass(frozen=True)
class Seam:
    """How an attention class calls the attention function.

    Args:
        takes_cache: Whether its forward takes a cache.
        calls: Number of calls a forward makes.
        mask: The expression given as mask.
        keywords: Expression of every keyword argument of the call.
        forward: What computes the attention in place of a forward that makes no such call.
    """

    takes_cache: bool = True
    calls: int = 1
    mask: str = "attention_mask"
    keywords: dict[str, str] = field(default_factory=dict, hash=False)
    forward: Callable[..., Any] | None = None

    def problems(self, module: nn.Module) -> Iterator[str]:
        """Yield what this attention does that a converted layer could not, for `module` of its class."""
        if self.calls != 1:
            yield f"it attends {self.calls} times a layer"
        if self.mask != "attention_mask":
            yield f"it makes a mask of its own ({self.mask})"
        for name, expression in self.keywords.items():
            if name not in UNDERSTOOD and not _is_none(expression, module):
                yield f"it passes {name}={expression}, which changes the scores"


def forward_tree(cls: type) -> ast.AST | None:
    """Return the syntax tree of the forward of `cls`; None if it has no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(cls, "forward", None)))))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return None


@functools.cache
def find_seam(cls: type) -> Seam | None:
    """Return how `cls` calls the attention function, or None if it does not look it up where transformers keeps it."""
    tree = forward_tree(cls)
    nodes = [] if tree is None else list(ast.walk(tree))
    assignments = [node for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value]
    functions = {
        ast.unparse(target)
        for node in assignments
        if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)  # type: ignore[arg-type]
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    if not functions:
        return None
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in functions]
    keywords = {k.arg: ast.unparse(k.value) for call in calls for k in call.keywords if k.arg}
    positional = [ast.unparse(call.args[4]) for call in calls if len(call.args) > 4]
    return Seam(
        cache_argument(cls.forward) is not None,  # type: ignore[attr-defined]
        len(calls),
        keywords.get("attention_mask", positional[0] if positional else "None"),
        keywords,
    )


def _is_none(expression: str, module: nn.Module) -> bool:
    """Whether an attribute path such as `self.config.softcap` leads to None; what can't be told counts as not."""
    first, *path = expression.split(".")
    if first != "self" or not all(name.isidentifier() for name in path):
        return expression == "None"
    value: object = module
    for name in path:
        value = getattr(value, name, None)
    return value is None
