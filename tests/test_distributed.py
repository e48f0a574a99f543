"""Training in several processes is training in one; a killed run goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import distributed_worker as worker
import processes
import pytest
import torch
from matrix import DEFAULTS, Case, tokens
from transformers import AutoModelForCausalLM

IDS = tokens(2, 24)
pytestmark = pytest.mark.slow
every_case = pytest.mark.parametrize(("model", "case"), worker.CASES, ids=[f"{m}-{c}" for m, c in worker.CASES])


def in_processes(job: Sequence[str], folder: Path) -> Path:
    """Run a job in processes that know of each other; if one fails, the others are ended."""
    logs = [folder / f"rank{rank}.log" for rank in range(worker.NUM_PROCESSES)]
    environments = processes.ranks(worker.NUM_PROCESSES)
    codes = processes.exit_codes(
        processes.start(worker.in_one_of_many, *job, folder, env=env, log=log)
        for env, log in zip(environments, logs, strict=True)
    )
    told = "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)
    assert codes == [0] * len(logs), told
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What jobs wrote, each run once."""
    done: dict[tuple[str, ...], Path | AssertionError] = {}

    def run(*job: str) -> Path:
        if job not in done:
            try:
                done[job] = in_processes(job, tmp_path_factory.mktemp("-".join(job)))
            except AssertionError as error:
                done[job] = error
        result = done[job]
        if isinstance(result, AssertionError):
            raise result
        return result

    return run


def assert_same(actual: worker.Outcome, expected: worker.Outcome) -> None:
    """Losses, gradients and parameters agree within rounding; `actual` may lack gradients."""
    losses = torch.tensor([float(loss) for loss in actual["losses"]])
    torch.testing.assert_close(losses, torch.tensor([float(x) for x in expected["losses"]]), atol=1e-5, rtol=1e-5)
    for kind in actual.keys() - {"losses"}:
        assert actual[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            torch.testing.assert_close(
                actual[kind][name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("wrapper", worker.WRAPPERS)
@every_case
def test_steps_in_two_processes_are_those_of_one(
    model: str, case: Case, wrapper: str, outcomes: Callable[..., Path]
) -> None:
    actual = torch.load(outcomes("torch") / f"{wrapper}-{model}-{case}.pt")
    expected = worker.train(worker.student(model, case), ([batch] for batch in worker.steps()), distributed=False)
    assert_same(actual, expected)


@pytest.mark.parametrize("wrapper", worker.WRAPPERS)
@pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
def test_texts_within_the_window_train_next_to_longer_ones(
    model: str, wrapper: str, outcomes: Callable[..., Path]
) -> None:
    """Feature maps see nothing while a text fits the window; the processes must still agree on what to exchange."""
    actual = torch.load(outcomes("uneven", wrapper) / f"{wrapper}-{model}-{worker.UNEVEN}.pt")
    batches = zip(worker.uneven_steps(0), worker.uneven_steps(1), strict=True)
    expected = worker.train(worker.student(model, worker.UNEVEN), map(list, batches), distributed=False)
    assert_same(actual, expected)


@pytest.mark.parametrize("wrapper", worker.WRAPPERS)
@every_case
def test_accelerate_accumulates_gradients_over_two_processes(
    model: str, case: Case, wrapper: str, outcomes: Callable[..., Path]
) -> None:
    folder = outcomes("accelerate", wrapper)
    actual = torch.load(folder / f"{wrapper}-{model}-{case}.pt")
    net = worker.student(model, case)
    expected = worker.train(net, ([batch] for batch in worker.steps()), distributed=False)
    micro = torch.stack(actual["losses"]).view(worker.NUM_STEPS, -1)
    assert_same({"losses": micro.mean(dim=1), "parameters": actual["parameters"]}, expected)
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"{wrapper}-{model}-{case}")
    assert type(loaded) is type(net)
    torch.testing.assert_close(loaded.eval()(IDS).logits, net.eval()(IDS).logits, atol=1e-4, rtol=1e-4)


@every_case
def test_trainer_in_two_processes_is_trainer_in_one(
    model: str, case: Case, outcomes: Callable[..., Path], tmp_path: Path
) -> None:
    actual = torch.load(outcomes("trainer") / f"trainer-{model}-{case}.pt")
    run = worker.trainer(worker.student(model, case), tmp_path, per_device_train_batch_size=worker.ROWS)
    run.train()
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}
    assert_same(actual, {"losses": worker.losses_of(run), "parameters": parameters})


@pytest.mark.parametrize(("model", "case"), [("llama-gqa", DEFAULTS[0]), ("gpt2", DEFAULTS[2])], ids=str)
def test_a_run_that_is_killed_resumes_on_the_same_loss_curve(model: str, case: Case, tmp_path: Path) -> None:
    whole = worker.long_run(model, case, tmp_path / "whole")
    whole.train()
    folder = tmp_path / "killed"
    log = tmp_path / "log"
    processes.kill_where_it_waits(worker.interrupted_job, model, case.name, folder, log=log)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-5"]  # steps 6 and 7 are lost
    assert processes.exit_codes([processes.start(worker.resumed_job, model, case.name, folder, log=log)]) == [0]
    resumed = torch.load(folder / "resumed.pt")
    assert resumed["losses"] == pytest.approx(worker.losses_of(whole), rel=1e-6)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed["parameters"][name], parameter, atol=1e-6, rtol=1e-5, msg=name)
