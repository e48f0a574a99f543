"""Converted tiny models that are trained, and a few steps of it."""

from __future__ import annotations

from typing import Any

import torch
from matrix import Case, shake, tiny_model


def student(model: str, case: Case, layers: list[int] | None = None, dropout: bool = False) -> Any:
    """The converted model that is trained, always with the same weights."""
    net = tiny_model(model)
    torch.manual_seed(0)  # of what conversion draws
    net = shake(net.convert_attention(case.mechanism, layers=layers, **case.options)).train()
    return net if dropout else without_dropout(net)


def without_dropout(net: Any) -> Any:
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return net


def train(net: torch.nn.Module, ids: torch.Tensor, steps: int = 6) -> torch.Tensor:
    """Train all that is trainable on `ids [B, T]`; return the logits after it.

    The loss must fall, every trainable parameter move, and every other stay.
    """
    trainable = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in net.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    parameters = dict(net.named_parameters())
    assert [name for name in trainable if torch.equal(parameters[name], trainable[name])] == []
    assert all(torch.equal(parameters[name], frozen[name]) for name in frozen)
    return net.eval()(ids).logits.detach()
