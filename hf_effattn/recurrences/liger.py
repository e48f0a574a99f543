"""The parameter-free gates of Liger."""

from __future__ import annotations

import torch
from torch.nn import functional

from .base import RECURRENCES, Recurrence, RecurrenceShape


@RECURRENCES.register("liger")
class Liger(Recurrence):
    """`α_t = sigmoid(k_t)^{1/16}` for each feature, from keys before rotary: gates without parameters of their own (Lan
    2025, arXiv 2503.01496). Needs as many features as the key has dimensions: the paper's map is `softmax`.

    The paper has no denominator and averages with the window's output; here both are under one normaliser.
    """

    before_rotary = True
    per_feature = True

    def __init__(self, shape: RecurrenceShape) -> None:
        super().__init__(shape)
        if shape.feature_dim != shape.head_dim:
            raise ValueError(
                f"recurrence 'liger' gates each dimension of the key, so it needs a feature map with {shape.head_dim} "
                f"features, such as 'softmax', 'elu' or 'relu'; this one has {shape.feature_dim}"
            )

    def log_decay(self, key: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return functional.logsigmoid(key) / 16
