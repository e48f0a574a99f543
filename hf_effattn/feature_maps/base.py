"""What a feature map is, and the registry of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from ..notation import compute_dtype, rotary_half
from ..registry import Registry

FEATURE_MAPS: Registry[type[FeatureMap]] = Registry("feature map")


class FeatureMap(nn.Module):
    """φ: maps each query or key of a head to features whose dot product imitates `exp(q·k/√D)` and is not negative.

    Queries and keys have an instance each. Maps work in float32, token by token, so that nothing depends on other
    tokens or on the length of the text.

    Args:
        head_dim: D, the size of the queries and keys.
        num_heads: Heads this instance sees (H for queries, G for keys); learned maps have parameters per head.
    """

    before_rotary: ClassVar[bool] = False  # whether it maps queries and keys as they were before rotary
    uses_positions: ClassVar[bool] = False  # whether features depend on the token's position
    max_position: int | None = None  # how many tokens a text may have, where there is a limit

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.feature_dim = head_dim  # F; maps with another number of features say so

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations that one head needs for one token (multiply and add count as two)."""
        return 2 * self.head_dim

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply float32 (or float64) x `[B, H, T, D]` by a matrix of each head, in maps that have one.

        This half of the map is apart because it is fastest on all tokens of a head at once.
        """
        return x

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map what `project` returned, `[B, H, T, ·]`, to features `[B, H, T, F]`."""
        raise NotImplementedError

    def features_at(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Do the same for tokens at `positions` `[B or 1, T]`, in maps that use them."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        arrange: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Map x to features `[B, H, T, F]`, computed in at least float32.

        Args:
            x: `[B, H, T, D]`; or `[B, H, T, 2D]`, where those before rotary stand behind those after it: the map takes
                the half it is made for.
            positions: `[B or 1, T]`, for maps that use them.
            arrange: Rearranges the projected tokens, whose features then come in that arrangement (as do positions).

        Returns:
            Features in the dtype of x, but float32 for float16, whose range is too small for some.
        """
        x = rotary_half(x, self.head_dim, self.before_rotary)
        wide = x if x.dtype == torch.float64 else x.float()
        projected = self.project(wide)
        if arrange is not None:
            projected = arrange(projected)
        if self.uses_positions:
            assert positions is not None
            features = self.features_at(projected, positions)
        else:
            features = self.features(projected)
        return features.to(compute_dtype(x.dtype))

    def reset_parameters(self) -> None:
        """Set learned parameters to their documented start (maps without parameters have nothing to do)."""


def map_options(name: str) -> list[str]:
    """Return the names of the options that the feature map called `name` has of its own."""
    parameters = inspect.signature(FEATURE_MAPS.get(name).__init__).parameters
    return [key for key in parameters if key not in ("self", "head_dim", "num_heads")]
