"""DeepSpeed's ZeRO-3 in two processes, which share out every parameter, trains as one process does."""

from __future__ import annotations

from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from matrix import Case
from test_distributed import assert_same, in_processes

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_processes(["zero"], tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize(
    ("model", "case"), worker.ZERO_CASES, ids=[f"{model}-{case}" for model, case in worker.ZERO_CASES]
)
def test_parameters_in_parts_train_as_whole_ones(model: str, case: Case, outcomes: Path, tmp_path: Path) -> None:
    actual = torch.load(outcomes / f"zero-{model}-{case}.pt")
    run = worker.trainer(worker.student(model, case), tmp_path, per_device_train_batch_size=worker.ROWS)
    run.train()
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}
    assert_same(actual, {"losses": worker.losses_of(run), "parameters": parameters})
