"""Learned absolute positions end somewhere: say so before the embedding fails with an index error."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .binding import remove_hook


def guard_positions(embedding: nn.Module) -> None:
    """Make `embedding` refuse positions it has not learned, with an error that says how many there are."""
    if check_positions not in embedding._forward_pre_hooks.values():
        embedding.register_forward_pre_hook(check_positions)


def unguard_positions(embedding: nn.Module) -> None:
    """Undo `guard_positions`."""
    remove_hook(embedding, check_positions)


def check_positions(embedding: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: raise a ValueError for a position beyond the learned ones."""
    if torch.compiler.is_compiling() or not args or args[0].is_meta:
        return
    learned, last = embedding.num_embeddings, int(args[0].max())
    if last >= learned:  # type: ignore[operator]
        raise ValueError(
            f"position {last} is beyond the {learned} learned positions of this model: converted attention needs no KV "
            f"cache, but the model cannot place tokens after {learned}. Shorten the text (prompt plus new tokens)"
        )
