"""Settings that hold for all tests: one thread (tiny models run faster), no network, reproducible examples."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

RECIPES = Path(__file__).parent.parent / "recipes"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

torch.set_num_threads(1)
settings.register_profile(
    "laws", deadline=None, derandomize=True, max_examples=4, suppress_health_check=list(HealthCheck)
)
settings.load_profile("laws")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports modules of the recipes."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import importlib

    from accelerate.state import AcceleratorState

    yield importlib.import_module
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Spare garbage collections, which trainers ask for, what was imported and collected: that stays."""
    gc.freeze()
