"""A long text a block of queries at a time, with a backward pass that keeps little: what blocks hand on to each other.

Autograd would keep everything each block makes, and fill a gradient of the whole text for every part of it that a block
takes. Here a block is computed again on the way back, and its gradients are added where its parts came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .collector import Collector

Tensors = Sequence[torch.Tensor]
Range = tuple[tuple[int, int], ...]  # of each tensor
Compute = Callable[[int, torch.Tensor | None, Tensors, Tensors], tuple[torch.Tensor, torch.Tensor | None]]


class Blocks(NamedTuple):
    """How a text is computed in blocks.

    Args:
        compute: `(block, carry, parts, shared) -> (output [B, H, t, V], carry)`, a pure function of its tensors and the
            parameters of `modules`.
        ranges: For each block, from where to where it takes each of the tensors that are cut. The first is the query.
        modules: Modules whose parameters `compute` uses.
        value_dim: V.
        repeatable: Whether `compute` gives the same again; with dropout it does not, and autograd keeps everything.
    """

    compute: Compute
    ranges: Sequence[Range]
    modules: tuple[nn.Module, ...]
    value_dim: int
    repeatable: bool = True

    def parts(self, block: int, tensors: Tensors) -> list[torch.Tensor]:
        return [x[:, :, low:high] for x, (low, high) in zip(tensors, self.ranges[block], strict=True)]


def in_blocks(
    blocks: Blocks, carry: torch.Tensor | None, tensors: Tensors, shared: Tensors = ()
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output `[B, H, T, V]` and what the last block hands on.

    Args:
        carry: What the first block gets; None if blocks hand nothing on.
        tensors: `[B, ·, ·, ·]`, cut along their third dimension; the query first.
        shared: Tensors that every block gets whole.
    """
    carried = () if carry is None else (carry,)
    is_learning = learns((*carried, *tensors, *shared), blocks.modules)
    if is_learning and blocks.repeatable and not torch.compiler.is_compiling():
        inputs = (carry, *tensors, *shared, *parameters_of(blocks.modules))
        output, carry = _Blocks.apply(blocks, len(tensors), len(shared), *inputs)
        return output, carry
    return _forward(blocks, carry, tensors, shared)[:2]


def learns(tensors: Tensors, modules: Sequence[nn.Module] = ()) -> bool:
    """Whether gradients of these tensors, or of learned parameters of these modules, may be asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *parameters_of(modules)))


def parameters_of(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Return the learned parameters of all of `modules`, in the order in which `call_with` takes them."""
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def call_with(modules: Sequence[nn.Module], parameters: Tensors, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` while `modules` have these parameters in place of their own."""
    caller = _Caller(modules)
    names = [name for name, _ in caller.named_parameters()]
    return functional_call(caller, dict(zip(names, parameters, strict=True)), (function, *arguments))


class _Caller(nn.Module):
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _forward(
    blocks: Blocks, carry: torch.Tensor | None, tensors: Tensors, shared: Tensors
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]:
    """Return output, what is handed on, and what each block got."""
    collector, got = Collector(tensors[0], blocks.value_dim), []
    for block in range(len(blocks.ranges)):
        got.append(carry)
        output, carry = blocks.compute(block, carry, blocks.parts(block, tensors), shared)
        collector.add(output)
    return collector.result(), carry, got


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, blocks: Blocks, num_cut: int, num_shared: int, carry: torch.Tensor | None, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.blocks, ctx.num_cut, ctx.num_shared, ctx.carries = blocks, num_cut, num_shared, carry is not None
        output, carry, got = _forward(blocks, carry, inputs[:num_cut], inputs[num_cut : num_cut + num_shared])
        ctx.save_for_backward(*inputs, *(x for x in got if x is not None))
        return output, carry

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, after: torch.Tensor | None) -> tuple[Any, ...]:
        blocks, wanted = ctx.blocks, ctx.needs_input_grad[4:]
        saved = ctx.saved_tensors  # once: gradient checkpointing computes them anew each time they are asked for
        inputs, got = saved[: len(wanted)], saved[len(wanted) :]
        cut, whole = inputs[: ctx.num_cut], inputs[ctx.num_cut :]
        grads = [torch.zeros_like(x) if want else None for x, want in zip(cut, wanted, strict=False)]
        grads += [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if want else None
            for x, want in zip(whole, wanted[ctx.num_cut :], strict=True)
        ]
        with torch.autocast(grad_output.device.type, enabled=False):
            for block in reversed(range(len(blocks.ranges))):
                carry = got[block].detach().requires_grad_() if ctx.carries else None
                given = [*blocks.parts(block, cut), *whole]
                leaves = [x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
                low, high = blocks.ranges[block][0]
                found, after = _block_backward(ctx, block, carry, leaves, grad_output[:, :, low:high], after)
                _add(grads[: ctx.num_cut], found[: ctx.num_cut], blocks.ranges[block])
                _add(grads[ctx.num_cut :], found[ctx.num_cut :])
        grads = [None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]
        return None, None, None, after if ctx.needs_input_grad[3] else None, *grads


def _block_backward(
    ctx: Any,
    block: int,
    carry: torch.Tensor | None,
    leaves: list[torch.Tensor],
    grad_output: torch.Tensor,
    after: torch.Tensor | None,
) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
    """Return the gradients of `leaves`, None for those that need none, and of `carry`.

    Args:
        after: The gradient of what the block hands on.
    """
    shared_from, learned_from = ctx.num_cut, ctx.num_cut + ctx.num_shared
    parts, shared, learned = leaves[:shared_from], leaves[shared_from:learned_from], leaves[learned_from:]
    with torch.enable_grad():
        output, new = call_with(ctx.blocks.modules, learned, ctx.blocks.compute, block, carry, parts, shared)
    outputs = [(output, grad_output)] if carry is None else [(output, grad_output), (new, after)]
    outputs = [(x, grad) for x, grad in outputs if x.requires_grad]
    wanted = [x for x in (*leaves, carry) if x is not None and x.requires_grad]
    if not outputs or not wanted:
        return [None] * len(leaves), after
    grads = torch.autograd.grad([x for x, _ in outputs], wanted, [g for _, g in outputs], allow_unused=True)
    by_leaf = iter(grads)
    found = [next(by_leaf) if x.requires_grad else None for x in leaves]
    return found, None if carry is None else next(by_leaf)


def _add(
    totals: list[torch.Tensor | None],
    found: list[torch.Tensor | None],
    ranges: Range | None = None,
) -> None:
    """Add what one block found to the gradients of all, each within its range."""
    for index, (total, part) in enumerate(zip(totals, found, strict=True)):
        if total is None or part is None:
            continue
        if ranges is not None:
            low, high = ranges[index]
            total = total[:, :, low:high]
        total.add_(part)
