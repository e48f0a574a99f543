"""Tensor parallelism: each process has a share of the heads, and of what mechanisms have learned for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

if torch.distributed.is_available():  # some builds of PyTorch lack it
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

STYLE = "effattn"  # what transformers' plans call it


class ByHead(TensorParallelLayer):
    """How a mechanism and its parts are shared out: parameters along their first dimension, which is that of heads."""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Leave of a parameter what belongs to the heads of this process."""
        whole = module._parameters[param]
        if whole is not None and not isinstance(whole, DTensor):
            part = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(part, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Let a mechanism attend with the heads of this process; its parts need nothing.

        Raises:
            ValueError: for a mechanism whose heads are not each by themselves, or whose number does not divide.
        """
        if hasattr(module, "share_heads"):
            module.share_heads(mesh.size())  # type: ignore[operator]
            module.register_forward_pre_hook(_take_own)
            module.register_forward_hook(_give_back, always_call=True)
        return module


def register_style() -> None:
    """Enter the style into transformers' table."""
    style: Any = ByHead()
    ALL_PARALLEL_STYLES.register(STYLE, style)


def extend_plan(model: PreTrainedModel) -> None:
    """Make the plan of tensor parallelism of `model`, if it has one, know its mechanisms; share them out if it is."""
    plan = {name: style for name, style in (model._tp_plan or {}).items() if style != STYLE}
    if not plan:
        return
    model._tp_plan = plan
    for name, module in model.named_modules():
        mechanism: Any = getattr(module, "effattn", None)
        if mechanism is None or not _has_own_heads(plan, name):
            continue
        parts = (part for part, _ in mechanism.named_modules(prefix=f"{name}.effattn"))
        model._tp_plan |= {replace_layer_number_by_wildcard(part): STYLE for part in parts}
        if (model._tp_size or 1) > 1 and mechanism.own == mechanism.geometry:
            _share_out(mechanism, _mesh_of(module))


def num_shares(model: PreTrainedModel, attention: nn.Module) -> int:
    """Return over how many processes the heads of an attention module of `model` are shared out."""
    size: int = model._tp_size or 1
    if size == 1:
        return 1
    name = next(name for name, module in model.named_modules() if module is attention)
    return size if _has_own_heads(model._tp_plan or {}, name) else 1


def _has_own_heads(plan: dict[str, str], attention: str) -> bool:
    """Whether by a plan each process projects to heads of its own; in some families all processes have all of them."""
    inside = f"{replace_layer_number_by_wildcard(attention)}."
    return any(style in ("colwise", "packed_colwise") for name, style in plan.items() if name.startswith(inside))


def _share_out(mechanism: nn.Module, mesh: Any) -> None:
    style = ALL_PARALLEL_STYLES[STYLE]
    style.install_forward(mechanism, mesh)
    for part in mechanism.modules():
        for name, _ in list(part.named_parameters(recurse=False)):
            style.shard_param(part, name, mesh)


def _mesh_of(attention: nn.Module) -> Any:
    """Return the mesh over which the projections of an attention module are shared out."""
    mesh = next(p.device_mesh for p in attention.parameters() if isinstance(p, DTensor))
    return mesh if mesh.ndim == 1 else mesh["tp"]


def _take_own(mechanism: Any, _: Any) -> None:
    """Forward pre-hook: put the parameters of this process in the place of those that are shared out."""
    mechanism.put_aside = []
    for part in mechanism.modules():
        parameters: dict[str, Any] = part._parameters
        whole = {name: x for name, x in parameters.items() if isinstance(x, DTensor)}
        mechanism.put_aside.append((parameters, whole))
        parameters.update({name: x.to_local() for name, x in whole.items()})


def _give_back(mechanism: Any, *_: Any) -> None:
    """Forward hook: undo `_take_own`."""
    for parameters, whole in mechanism.put_aside:
        parameters.update(whole)
    del mechanism.put_aside
