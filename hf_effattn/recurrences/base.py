"""What a recurrence is, and the registry of them."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from ..notation import rotary_half
from ..registry import Registry

# A decay to less than 1 % in one token counts as that, and chunks with decays of each feature are short: so the
# exponents within a chunk, up to half of it away from its middle, stay within float32.
LEAST = -5.0
PER_FEATURE_CHUNK = 16
RECURRENCES: Registry[type[Recurrence]] = Registry("recurrence")


class Gates(NamedTuple):
    """What each token does to the state before it enters it.

    Args:
        log_decay: `log α` `[B, G, T, 1 or F]`, at most 0; None without decay.
        strength: β `[B, G, T, 1]` of the delta rule, between 0 and 1; None for a sum.
    """

    log_decay: torch.Tensor | None = None
    strength: torch.Tensor | None = None


class RecurrenceShape(NamedTuple):
    """Sizes a recurrence is made for.

    Args:
        num_heads: H, query heads; num_kv_heads: G, key/value heads.
        head_dim: D, of the keys; feature_dim: F, of the features.
        hidden_size: Of the layer's input; None where there is none to read gates from.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    feature_dim: int
    hidden_size: int | None = None


class Recurrence(nn.Module):
    """How the state of linear attention goes from one token to the next: `S_t = α_t ∘ S_{t-1} + φ(k_t) [v_t, 1]ᵀ`.

    The decay α belongs to a key/value head, and either to the head as a whole or to each of its features. Numerator and
    denominator decay together: the output stays a weighted mean of values, and with α = 1 nothing changes.

    With the *delta rule* a token first takes away what its key recalls: the part of the state that holds values becomes
    `S_t = α_t S_{t-1} + φ(k_t) β_t (v_t − α_t S_{t-1}ᵀ φ(k_t))ᵀ` for features of length 1. The last column stays the
    decaying sum of the features, which weighs the linear past behind a window; the output is `S_tᵀ φ(q_t)` itself.

    Args:
        shape: Heads and dimensions.
    """

    before_rotary: ClassVar[bool] = False  # whether decays come from keys as they were before rotary
    per_feature: ClassVar[bool] = False  # whether each feature has a decay of its own
    delta: ClassVar[bool] = False  # whether it follows the delta rule
    num_gates: ClassVar[int] = 0  # numbers that `gates` makes of the layer's input for each token and key/value head

    def __init__(self, shape: RecurrenceShape) -> None:
        super().__init__()
        self.shape = shape

    def read_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the `num_gates` numbers E that gates are made of, `[B, G, T, E]`, for the layer's input `[B, T, ·]`.

        They stand behind the token's key in the last dimension, wherever the key goes.
        """
        raise NotImplementedError

    def log_decay(self, key: torch.Tensor, read: torch.Tensor) -> torch.Tensor | None:
        """Return `log α` `[B, G, T, 1 or F]`; None without decay.

        Args:
            key: `[B, G, T, D]`, float32; read: what `read_hidden` returned, float32.
        """
        return None

    def strength(self, read: torch.Tensor) -> torch.Tensor | None:
        """Return β `[B, G, T, 1]`; None without delta rule."""
        return None

    def forward(self, key: torch.Tensor) -> Gates:
        """Return the gates of keys `[B, G, T, D]` of any dtype, or `[B, G, T, 2D]` with those before rotary behind;
        with what `read_hidden` returned behind either."""
        wide = key if key.dtype == torch.float64 else key.float()
        own = self.without_gates(wide)
        read = wide[..., own.shape[-1] :]
        decay = self.log_decay(rotary_half(own, self.shape.head_dim, self.before_rotary), read)
        return Gates(None if decay is None else decay.clamp(min=LEAST), self.strength(read))

    def without_gates(self, key: torch.Tensor) -> torch.Tensor:
        """Return keys without what stands behind them for the gates."""
        return key[..., : key.shape[-1] - self.num_gates] if self.num_gates else key

    def start_for(self, rate: torch.Tensor) -> torch.Tensor:
        """Return the `start` of recurrences that have this parameter with which `log α = −rate` where the layer's input
        adds nothing, for rates `[G]`."""
        raise NotImplementedError

    def start_decay(self) -> torch.Tensor:
        """Return this α of each key/value head `[G]`, the mean over its features."""
        gates = next(self.parameters()).new_zeros(1, self.shape.num_kv_heads, 1, self.shape.head_dim + self.num_gates)
        log_decay = self(gates).log_decay
        return log_decay.exp().mean(dim=(0, 2, 3))

    def output(self, numerator: torch.Tensor) -> torch.Tensor:
        """Return the output of a delta rule, from `S_tᵀ φ(q_t)` `[·, G, R·C, V]`."""
        raise NotImplementedError

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token, all heads together, beyond those of a sum."""
        return 2 * self.shape.num_kv_heads * self.num_gates * (self.shape.hidden_size or 0)

    def chunk_size(self, wanted: int) -> int:
        """Return how many tokens a chunk may have."""
        return min(wanted, PER_FEATURE_CHUNK) if self.per_feature else wanted

    def reset_parameters(self) -> None:
        """Set learned parameters to their documented start."""

    def _hidden_size(self) -> int:
        if self.shape.hidden_size is None:
            raise ValueError(f"{type(self).__name__} reads its gates from the layer's input; give its hidden_size")
        return self.shape.hidden_size
