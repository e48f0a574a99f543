"""The matrix of all laws: models × every mechanism × every backend, read from the registries."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import inspect
from dataclasses import dataclass, field
from typing import Any

import families
import pytest
import torch
import transformers
from families import VOCABULARY
from packaging.requirements import Requirement
from transformers import PreTrainedModel
from transformers.dependency_versions_table import deps

from hf_effattn import LinearConfig, SparseConfig
from hf_effattn.cache import cache_argument
from hf_effattn.feature_maps import FEATURE_MAPS
from hf_effattn.ops.sparse import choose_backend
from hf_effattn.patterns import (
    PATTERNS,
    Pattern,
    bigbird,
    dilated,
    global_tokens,
    make_pattern,
    shifted,
    sinks,
    sliding_window,
    streaming,
    strided,
)
from hf_effattn.recurrences import RECURRENCES
from hf_effattn.selectors import SELECTORS

PEFT = importlib.metadata.version("peft")
with_fitting_peft = pytest.mark.skipif(
    PEFT not in Requirement(deps["peft"]).specifier, reason=f"this transformers wants {deps['peft']}, here is {PEFT}"
)
# A value for every option a pattern may have; small, so that tiny texts meet all cases.
PATTERN_OPTIONS = {
    "window": 6,
    "num_sinks": 2,
    "positions": (0, 9),
    "stride": 5,
    "num_summary": 2,
    "group_size": 6,
    "block_size": 4,
    "num_random": 2,
    "seed": 3,
}
LINEAR_BACKENDS = [name for name in LinearConfig.backends if name != "triton"]  # which `test_triton` takes to models
COMPOSITIONS = {
    "undilated": dilated(5, 1),
    "dilated|global": dilated(3, 4) | global_tokens((0, 7)),
    "window&dilated": sliding_window(9) & dilated(4, 3),
    "window|sinks": sliding_window(3) | sinks(1),
    "strided|global": strided(4) | global_tokens((2,)),
    "bigbird|sinks": bigbird(3, 2) | sinks(2),
    "shifted&window": shifted(8) & sliding_window(5),
    "windows": sliding_window((2, 5, 3, 9)),
    "windows of scattered heads": sliding_window((3, None, 3, 6)),
    "windows of kv heads": streaming((None, None, 6, 6), 2),
    "windows|global": sliding_window((2, 2, 7, 7)) | global_tokens((0, 4)),
    "windows&shifted": sliding_window((3, 3, 7, 7)) & shifted(8),
}


@dataclass(frozen=True)
class Case:
    """One way to convert a model."""

    name: str
    mechanism: str
    options: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return self.name


def patterns() -> dict[str, Pattern]:
    """Every registered pattern with small options, and some compositions."""
    made = {}
    for name in PATTERNS:
        parameters = inspect.signature(PATTERNS.get(name)).parameters
        made[name] = make_pattern(name, {key: PATTERN_OPTIONS[key] for key in parameters})
    return made | COMPOSITIONS


def cases() -> list[Case]:
    """Every feature map, recurrence, way of joining and pattern, on every backend that computes it.

    Backends don't know which feature map or recurrence they work for, so one map meets them all; and a state is of the
    same kind for all maps but those that use positions.
    """
    found = []
    for name in FEATURE_MAPS:
        full = name == LinearConfig.feature_map
        shapes = [(6, 2, 4)]
        if full or FEATURE_MAPS.get(name).uses_positions:
            shapes += [(0, 0, 1), (5, 0, 1)]
        for window, num_sinks, chunk in shapes:
            for backend in LINEAR_BACKENDS if full else ("auto",):
                options = {"feature_map": name, "window": window, "num_sinks": num_sinks, "chunk_size": chunk}
                found.append(Case(f"{name}-w{window}s{num_sinks}-{backend}", "linear", {**options, "backend": backend}))
    for name in RECURRENCES:
        for window, num_sinks in ((0, 0), (6, 2)):
            options = {"feature_map": "softmax", "recurrence": name, "window": window, "num_sinks": num_sinks}
            found.append(
                Case(f"{name}-w{window}s{num_sinks}", "linear", {**options, "chunk_size": 4, "backend": "auto"})
            )
    for backend in LINEAR_BACKENDS:
        options = {"window": 6, "num_sinks": 2, "chunk_size": 4, "join": "lolcats", "backend": backend}
        found.append(Case(f"lolcats-{backend}", "linear", options))
    for name, pattern in patterns().items():
        for backend in sorted({*SparseConfig.backends} - {"flex"}):  # without gradients on a CPU: see test_flex
            try:
                choose_backend(pattern, backend)
            except ValueError:
                continue
            found.append(Case(f"{name}-{backend}", "sparse", {"pattern": pattern, "backend": backend}))
    options = {"selector": "vertical_slash", "block_size": 16, "num_columns": 3, "num_diagonals": 4, "backend": "auto"}
    found.append(Case("vertical_slash", "sparse", options))
    for name in (name for name in SELECTORS if name != "vertical_slash"):
        for backend in ("auto", "gathered", "reference"):
            options = {"selector": name, "block_size": 8, "num_blocks": 3, "backend": backend}
            found.append(Case(f"{name}-{backend}", "sparse", options))
    return found


CASES = cases()
ONE_CASE_EACH = [case for case in CASES if case.options["backend"] == "auto"]  # for laws that backends can't break
ONE_STATE_EACH = [  # for laws about what a cache holds: that of most feature maps is of one kind
    case for case in ONE_CASE_EACH if case.options.get("feature_map", "hedgehog") in ("hedgehog", "cosformer")
]
DEFAULTS = [
    Case("linear", "linear", {"window": 6, "num_sinks": 2}),
    Case("pure-linear", "linear", {"window": 0, "num_sinks": 0, "feature_map": "elu"}),
    Case("streaming", "sparse", {"window": 6, "num_sinks": 2}),
]
OF_FOUR_HEADS = [*DEFAULTS, Case("by_head", "sparse", {"window": (None, None, 6, 6), "num_sinks": 2})]
"""The defaults, and windows by head for the models below."""


MODELS: dict[str, dict[str, Any]] = {
    "llama-gqa": {"model_type": "llama"},
    "gpt2": {"model_type": "gpt2"},
}
"""The models of the whole matrix: shared key/value heads and rotary positions, and neither. `test_families` takes every
family through the laws with the default cases."""

PAIRS = [(model, case) for model in MODELS for case in (CASES if model == "llama-gqa" else ONE_STATE_EACH)]
"""Backends and feature maps get tensors and know nothing of models (`test_ops_*` compare them for all numbers of
heads), so one model meets them all, and the others meet what differs in caches."""


def tiny_config(model: str, **changes: Any) -> Any:
    options = {**MODELS[model], **changes}
    return families.tiny_config(options.pop("model_type"), **options)


@functools.cache
def _original(model: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(model)).eval()


def tiny_model(model: str) -> PreTrainedModel:
    """A tiny random model, always with the same weights; a new one at each call."""
    return copy.deepcopy(_original(model))


@functools.cache
def _converted(model: str, case: Case) -> PreTrainedModel:
    return shake(tiny_model(model).convert_attention(case.mechanism, **case.options))


def converted_model(model: str, case: Case) -> PreTrainedModel:
    """`tiny_model` converted, with learned parameters moved away from their start; shared, so don't change it."""
    return _converted(model, case)


def shake(model: PreTrainedModel) -> PreTrainedModel:
    """Move what conversion added away from its start, so that tests can see it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".effattn." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                if name.endswith(".effattn.bias"):
                    parameter.add_(4.0)  # open the linear part
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def through(cache: Any) -> dict[str, Any]:
    """The keyword argument that takes `cache`, under the name that this transformers has for it."""
    name = cache_argument(transformers.LlamaForCausalLM.forward)
    assert name is not None
    return {name: cache}


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token rows on the left: ids and attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids as `generate` makes them from a padding mask."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
