"""Queries and keys as they were before rotary, for mechanisms that place tokens in another way.

The attention function gets them after it. A rotation by known angles can be undone: by the family's own function, with
the sine negated. How an attention class rotates is read from its source.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .base import Architecture
from .seam import forward_tree

FUNCTION = "apply_rotary_pos_emb"
# Python 3.10 writes the left side in brackets.
UNDERSTOOD = re.compile(rf"\(?(query_\w+), (key_\w+)\)? = {FUNCTION}\(\1, \2, cos, sin\)")
Undo = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def find_undo(architecture: Architecture, module: nn.Module) -> Undo | None:
    """Return `undo(query, key, position_embeddings)` for `module`; None if it does not rotate at all.

    Raises:
        ValueError: if it rotates in a way that is not understood; the message shows it.
    """
    cls: type = type(module)
    statements = _statements(cls)
    if architecture.forward is None and not statements:
        return None
    if architecture.forward is None and len(statements) == 1 and UNDERSTOOD.fullmatch(statements[0]):
        return functools.partial(undo_rotary, getattr(sys.modules[cls.__module__], FUNCTION))
    how = f": {'; '.join(statements)}" if statements else ""
    raise ValueError(
        f"queries and keys before rotary are needed, but how a {cls.__name__} rotates cannot be undone{how}; choose "
        "options that work after rotary"
    )


def find_rotation(architecture: Architecture, module: nn.Module, model: nn.Module) -> Rotate:
    """Return `rotate(x, positions)`, which turns heads before rotary `[B, H, T, D]` to positions `[B, T]`.

    Raises:
        ValueError: if the model has no rotary positions, has several kinds of them, or turns by angles that depend on
            the length of the text.
    """
    embeddings = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if find_undo(architecture, module) is None or len(embeddings) != 1:
        raise ValueError(
            f"rolling positions need one kind of rotary positions; this {type(model).__name__} has {len(embeddings)}"
        )
    kind = getattr(embeddings[0], "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"rolling positions do not go with angles that depend on the length (rope type {kind!r})")
    return functools.partial(rotate_to, getattr(sys.modules[type(module).__module__], FUNCTION), embeddings[0])


def rotate_to(
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    embedding: nn.Module,
    x: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Turn x `[B, H, T, D]` to `positions` `[B, T]` by the family's function and its module of angles."""
    cos, sin = embedding(x, positions)
    size = cos.shape[-1]
    turned, _ = rotate(x[..., :size], x[..., :size], cos, sin)
    return torch.cat((turned.to(x.dtype), x[..., size:]), dim=-1)


def undo_rotary(
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query `[B, H, T, D]` and key `[B, G, T, D]` as they were before `rotate(query, key, cos, sin)`.

    Args:
        rotate: The family's function. It rotates the first dimensions, as many as cosines and sines have.
        position_embeddings: Cosines and sines `[B, T, ·]`, which some families scale.
    """
    cos, sin = (x.float() for x in position_embeddings)
    size = cos.shape[-1]
    scale = (cos[..., :1].square() + sin[..., :1].square())[:, None]  # [B, 1, T, 1]
    turned = rotate(query[..., :size].float(), key[..., :size].float(), cos, -sin)
    before_query, before_key = (
        torch.cat(((part / scale).to(x.dtype), x[..., size:]), dim=-1)
        for part, x in zip(turned, (query, key), strict=True)
    )
    return before_query, before_key


@functools.cache
def _statements(cls: type) -> tuple[str, ...]:
    """The statements of a class's forward that rotate; with its condition, if one is rotated on a condition only."""
    found: list[str] = []

    def walk(node: ast.AST, condition: str) -> None:
        if isinstance(node, ast.If):
            condition = f"if {ast.unparse(node.test)}: "
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and "rotary" in ast.unparse(node.value):
            found.append(condition + ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            walk(child, condition)

    tree = forward_tree(cls)
    if tree is None:
        return ("its source is not there to read",)
    walk(tree, "")
    return tuple(found)
