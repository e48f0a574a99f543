"""torch.export takes converted models where it takes the dense ones, and what it makes answers for other inputs too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import OF_FOUR_HEADS, Case, close, converted_model, positions_of, tiny_model, tokens

pytestmark = pytest.mark.slow
IDS = tokens(2, 24)
OTHER = tokens(2, 24, seed=1)
BATCH = torch.export.Dim("batch", min=2, max=8)
LENGTH = torch.export.Dim("length", min=2, max=100)
on_two_models = pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
cases = pytest.mark.parametrize("case", [None, *OF_FOUR_HEADS], ids=str)  # None: the dense model, the standard
Inputs = dict[str, Any]


def made(model: str, case: Case | None) -> Any:
    return tiny_model(model) if case is None else converted_model(model, case)


def exported(net: torch.nn.Module, inputs: Inputs, dynamic: dict[int, Any] | None = None, strict: bool = False) -> Any:
    shapes = None if dynamic is None else {**dict.fromkeys(inputs, dynamic), "use_cache": None}
    program = torch.export.export(net, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=strict)
    return program.module()


def compare(program: Any, net: Any, inputs: Inputs, real: torch.Tensor | None = None) -> None:
    actual, expected = (call(**inputs, use_cache=False).logits for call in (program, net))
    if real is None:
        real = torch.ones_like(inputs["input_ids"])
    close(actual[real.bool()], expected[real.bool()])


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@cases
@on_two_models
@torch.no_grad()
def test_a_text_without_a_mask_exports(model: str, case: Case | None, strict: bool) -> None:
    net = made(model, case)
    program = exported(net, {"input_ids": IDS}, strict=strict)
    for ids in (IDS, OTHER):
        compare(program, net, {"input_ids": ids})


@cases
@on_two_models
@torch.no_grad()
def test_a_mask_is_an_input_of_the_exported_model(model: str, case: Case | None) -> None:
    """Exported without padding and for one size of batch, right with any padding and size."""
    net = made(model, case)
    full = torch.ones_like(IDS)
    inputs = {"input_ids": IDS, "attention_mask": full, "position_ids": positions_of(full)}
    program = exported(net, inputs, dynamic={0: BATCH})
    left, right = torch.ones(3, 24, dtype=torch.long), torch.ones_like(IDS)
    left[0, :9] = left[2, :23] = right[1, 15:] = 0
    for mask in (full, left, right):
        inputs = {"input_ids": tokens(*mask.shape, seed=1), "attention_mask": mask, "position_ids": positions_of(mask)}
        compare(program, net, inputs, real=mask)


@cases
@on_two_models
@torch.no_grad()
def test_packed_documents_are_honoured_or_refused_by_the_exported_model(model: str, case: Case | None) -> None:
    """Exported with the positions of one document, run with those of two: these must not see each other."""
    net = made(model, case)
    positions = torch.arange(24).expand(2, -1)
    program = exported(net, {"input_ids": IDS, "position_ids": positions})
    compare(program, net, {"input_ids": OTHER, "position_ids": positions})
    packed = {"input_ids": IDS, "position_ids": torch.cat((torch.arange(9), torch.arange(15))).expand(2, -1)}
    try:
        actual = program(**packed, use_cache=False).logits
    except RuntimeError:
        assert case is not None
    else:
        close(actual, net(**packed, use_cache=False).logits)


@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
@on_two_models
@torch.no_grad()
def test_an_exported_model_has_one_length(model: str, case: Case) -> None:
    """A limit: loops over chunks and blocks of the text are unrolled. The exporter says so."""
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
        exported(made(model, case), inputs, dynamic={0: BATCH, 1: LENGTH})
