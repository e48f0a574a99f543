"""The training recipes: a killed run goes on as if it had not been; processes agree."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import load_file

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = {
    "documents": str(Path(__file__).parent / "data" / "prose.txt"),
    "options": {"window": 6, "num_sinks": 2},
    "lengths": [24, 32],
    "batch_size": 2,
    "calibration": 1,
    "transfer_steps": 2,
    "transfer_window": 0,
    "distill_steps": 4,
    "window_dropout": 1.0,
    "windows": [0, 3],
    "save_every": 1,
    "validate_every": 2,
    "held_out": 2,
}


def load(name: str) -> Any:
    from small import small_model, small_tokenizer

    tokenizer = small_tokenizer()
    return small_model(tokenizer), tokenizer


def lines(folder: Path, *left_out: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", *left_out)} for line in found]


TUNING = {
    "documents": SMALL["documents"],
    "length": 24,
    "steps": 4,
    "accumulation": 2,
    "save_every": 2,
    "held_out": 2,
    "validate_every": 2,
}


def always_fsdp2() -> None:
    """Let every Accelerator share out weights, also on a CPU, where the settings of a launch are not heeded."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from distributed_worker import allow_fsdp_on_cpu

    begin = Accelerator.__init__

    def sharding(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        policy = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "FULL_STATE_DICT"}
        allow_fsdp_on_cpu(self, FullyShardedDataParallelPlugin(fsdp_version=2, **policy))

    Accelerator.__init__ = sharding


def work(job: str, folder: Path, changes: dict[str, Any], waits: Callable[[], None] | None = None) -> None:
    """What other processes do: train on a tiny model.

    Args:
        changes: Of the config, but `leave`, a step of which the process ends, and `fsdp2`.
        waits: What is done at a step `stop`.
    """
    sys.path.insert(0, str(RECIPES))
    import settings

    stop, leave, fsdp2 = (changes.pop(name, None) for name in ("stop", "leave", "fsdp2"))
    if fsdp2:
        always_fsdp2()

    def wait(step: int) -> None:
        if step == stop:
            assert waits is not None
            waits()
        if step == leave:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # one has what they meet at
                torch.distributed.destroy_process_group()
            sys.exit()

    from distributed_worker import assert_sharded

    if job == "distill":
        import distill

        class Watched(distill.Distillation):
            def validate(self, step: int) -> None:
                assert_sharded(self.student, bool(fsdp2) and step > self.config.transfer_steps)
                super().validate(step)

        distill.Distillation = Watched  # type: ignore[misc]
        distill.run(settings.DistillConfig(**{**SMALL, "out": str(folder), **changes}), load, wait)
    else:
        import finetune
        from transformers import TrainerCallback

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                assert_sharded(model, bool(fsdp2))

        finetune.run(settings.FinetuneConfig(**{**TUNING, "out": str(folder), **changes}), load, [Look()])
    assert not torch.distributed.is_initialized()  # else the process may abort when it ends


def distill(recipes: Any, folder: Path, after_step: Any = lambda step: None, **changes: Any) -> Path:
    config = recipes("settings").DistillConfig(**{**SMALL, "out": str(folder), **changes})
    return recipes("distill").run(config, load, after_step)


def test_distillation_learns_and_leaves_an_adapter(recipes: Any, tmp_path: Path) -> None:
    from hf_effattn.recovery import load_adapter

    folder = distill(recipes, tmp_path)
    found = lines(tmp_path)
    assert [x["step"] for x in found if x["stage"] == "transfer"] == [1, 2]
    assert [x["step"] for x in found if x["stage"] == "distill"] == [3, 4, 5, 6]
    assert [x["tokens"] for x in found if x["stage"] == "distill"] == [48, 48, 64, 64]
    assert [x["step"] for x in found if x["stage"] == "validation"] == [0, 2, 4, 6]
    assert {x["window"] for x in found if x["stage"] == "distill"} - {None} <= {0, 3}
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-000005", "checkpoint-000006"]
    again = recipes("distill").Distillation(recipes("settings").DistillConfig(**{**SMALL, "out": str(tmp_path)}), load)
    again.student = load_adapter(load("")[0], folder).eval()
    again.validate(6)
    assert lines(tmp_path)[-1] == [x for x in found if x["stage"] == "validation"][-1]


class Killed(Exception):
    """Stands for a kill."""


def kill_at(number: int) -> Any:
    def kill(step: int) -> None:
        if step == number:
            raise Killed

    return kill


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(recipes: Any, tmp_path: Path, at: int) -> None:
    distill(recipes, tmp_path / "whole")
    with pytest.raises(Killed):
        distill(recipes, tmp_path / "killed", kill_at(at))
    done = []
    distill(recipes, tmp_path / "killed", done.append)
    assert done[0] == at  # its checkpoint had not been written yet
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    first, second = (adapter(tmp_path / name) for name in ("killed", "whole"))
    assert first == second


def adapter(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "adapter").glob("*.safetensors")}


def test_a_run_does_not_go_on_with_another_config(recipes: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        distill(recipes, tmp_path, kill_at(4))
    with pytest.raises(ValueError, match="other values of seed, distill_steps"):
        distill(recipes, tmp_path, seed=1, distill_steps=5)
    steps: list[int] = []
    distill(recipes, tmp_path, steps.append, seed=1, resume=False)
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True, "gradient_checkpointing": True, "transfer_window": None},
        {"reverse_weight": 0.5, "temperature": 2.0, "lora_mlp": True, "transfer_steps": 0},
        {"mechanism": "sparse", "calibration": 0},
    ],
    ids=["bf16", "reverse", "sparse"],
)
def test_options_of_distillation(recipes: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = distill(recipes, tmp_path, **{"distill_steps": 2, **changes})
    assert (folder / "adapter_model.safetensors").is_file()
    assert all(x["loss"] < 20 for x in lines(tmp_path))


def test_a_plan_is_trained_where_it_converts(recipes: Any, tmp_path: Path) -> None:
    from hf_effattn import LinearConfig, Plan
    from hf_effattn.plans import Budget, LayerChoice
    from hf_effattn.recovery import load_adapter

    names = ("dense", "linear")
    candidates = {"dense": None, "linear": LinearConfig(window=6, num_sinks=2).to_dict()}
    nothing = dict.fromkeys(names, 0.0)
    layers = tuple(LayerChoice(index, name, nothing, nothing) for index, name in enumerate(names))
    data = (candidates, layers, 0.0, (), 0.0, {})
    Plan("llama", 2, 64, Budget("bytes", 1.0), 1.0, 0.0, *data).save(tmp_path / "plan.json")
    folder = distill(recipes, tmp_path / "out", plan=str(tmp_path / "plan.json"), options={})
    trained = {key.split(".layers.")[1][0] for key in load_file(folder / "adapter_model.safetensors")}
    trained |= {key.split(".layers.")[1][0] for key in load_file(folder / "effattn.safetensors")}
    assert trained == {"1"}
    loaded = load_adapter(load("")[0], folder)
    assert [bool(layer) for layer in loaded.config.effattn["layers"]] == [False, True]
    with pytest.raises(ValueError, match="a plan says all; leave out options"):
        distill(recipes, tmp_path / "other", plan=str(tmp_path / "plan.json"))


def test_checkpointing_and_small_batches_change_nothing(recipes: Any, tmp_path: Path) -> None:
    distill(recipes, tmp_path / "plain", micro_batch_size=2)
    distill(recipes, tmp_path / "saving", micro_batch_size=1, gradient_checkpointing=True)
    assert_same(tmp_path / "saving", tmp_path / "plain")


def assert_same(actual: Path, expected: Path) -> None:
    assert len(lines(actual)) == len(lines(expected))
    for a, b in zip(lines(actual), lines(expected), strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "grad_norm", "kl"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-3, abs=1e-5), (key, a, b)
        assert [a[k] for k in ("stage", "step")] == [b[k] for k in ("stage", "step")]
        assert a.get("window") == b.get("window")


def test_a_loss_that_is_no_number_stops_the_run(recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_effattn import recovery

    kl = recovery.forward_kl
    monkeypatch.setattr(
        recovery, "forward_kl", lambda own, *rest: kl(own * (torch.nan if own.requires_grad else 1), *rest)
    )
    with pytest.raises(recovery.Diverged, match=r"step 3: .*checkpoint-000002"):
        distill(recipes, tmp_path)


def test_kept_logits_spare_the_teacher(recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_effattn.recovery import TopK

    distill(recipes, tmp_path / "one", cached_logits=30)
    kept = {path.name: load_file(path) for path in (tmp_path / "one" / "teacher").iterdir()}
    assert sorted(len(x["values"]) for x in kept.values()) == [24] * 4 + [32] * 4  # the windows of distillation
    shutil.copytree(tmp_path / "one" / "teacher", tmp_path / "two" / "teacher")
    monkeypatch.delattr(TopK, "of")
    distill(recipes, tmp_path / "two", cached_logits=30)
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert adapter(tmp_path / "two") == adapter(tmp_path / "one")
    with pytest.raises(AttributeError):  # nothing is left of the former run
        distill(recipes, tmp_path / "two", cached_logits=30, resume=False)
    with pytest.raises(ValueError, match=r"reverse_weight=0.5 takes all logits, cached_logits=30 keeps the largest"):
        distill(recipes, tmp_path / "three", cached_logits=30, reverse_weight=0.5)


def test_other_launches_and_batches_are_refused(recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="batch_size=2 is no multiple of 3 processes"):
        distill(recipes, tmp_path)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)  # of version 1
    with pytest.raises(ValueError, match=r"distributed_type=FSDP; valid: NO, .*, and FSDP with fsdp_version: 2"):
        distill(recipes, tmp_path)


def finetune(recipes: Any, folder: Path, callbacks: Any = None, **changes: Any) -> Path:
    config = recipes("settings").FinetuneConfig(**{**TUNING, "out": str(folder), **changes})
    return recipes("finetune").run(config, load, callbacks)


@pytest.mark.parametrize("kind", ["linear", "dense", "recovered"])
def test_finetuning_goes_on_after_a_kill(recipes: Any, tmp_path: Path, kind: str) -> None:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise Killed

    changes: dict[str, Any] = {"linear": {"mechanism": "linear", "options": SMALL["options"]}}.get(kind, {})
    if kind == "recovered":
        changes = {"adapter": str(distill(recipes, tmp_path / "recovered"))}
    whole = finetune(recipes, tmp_path / "whole", **changes)
    with pytest.raises(Killed):
        finetune(recipes, tmp_path / "killed", [Kill()], **changes)
    finetune(recipes, tmp_path / "killed", **changes)
    assert adapter(tmp_path / "killed") == adapter(whole.parent)


def in_two(job: str, folder: Path, **changes: Any) -> None:
    logs = [folder.with_name(f"{folder.name}{rank}.log") for rank in range(2)]
    started = [
        processes.start(work, job, folder, changes, env={"ACCELERATE_USE_CPU": "1", **env}, log=log)
        for env, log in zip(processes.ranks(2), logs, strict=True)
    ]
    assert processes.exit_codes(started) == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 5])
def test_sigkill_is_survived(tmp_path: Path, at: int) -> None:
    whole, killed, log = (tmp_path / name for name in ("whole", "killed", "log"))
    assert processes.exit_codes([processes.start(work, "distill", whole, {}, log=log)]) == [0]  # as the others are
    processes.kill_where_it_waits(work, "distill", killed, {"stop": at}, log=log)
    assert processes.exit_codes([processes.start(work, "distill", killed, {}, log=log)]) == [0]
    assert lines(killed) == lines(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp2", "changes"),
    [(False, {}), (True, {"gradient_checkpointing": True}), (True, {"cached_logits": 20})],
    ids=["ddp", "fsdp2", "fsdp2 cached"],
)
def test_two_processes_distil_and_go_on_as_one_does(
    recipes: Any, tmp_path: Path, fsdp2: bool, changes: dict[str, Any]
) -> None:
    distill(recipes, tmp_path / "one", batch_size=4, **changes)
    for leave in (5, None):  # the second time from the checkpoint of step 4
        in_two("distill", tmp_path / "two", fsdp2=fsdp2, leave=leave, batch_size=4, **changes)
        kept = sorted((tmp_path / "two" / "teacher").glob("*"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[-1:]:  # one process lacks of step 5 what the other has
            path.unlink()
    assert_same(tmp_path / "two", tmp_path / "one")
    assert_same_adapter(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "two" / "checkpoint-000006")
    distill(recipes, tmp_path / "two", batch_size=4, **changes)  # one process goes on from step 5 of two
    assert_same(tmp_path / "two", tmp_path / "one")


def assert_same_adapter(actual: Path, expected: Path) -> None:
    """Both folders have adapters that load and hold the same numbers, up to rounding."""
    found, wanted = (loaded(folder / "adapter").state_dict() for folder in (actual, expected))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def loaded(folder: Path) -> Any:
    from peft import PeftModel

    from hf_effattn.recovery import load_adapter

    is_ours = (folder / "effattn.safetensors").exists()
    return load_adapter(load("")[0], folder) if is_ours else PeftModel.from_pretrained(load("")[0], folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp2", "dense"), [(False, False), (True, False), (True, True)], ids=["ddp", "fsdp2", "fsdp2 dense"]
)
def test_finetuning_in_two_processes_is_that_of_one(recipes: Any, tmp_path: Path, fsdp2: bool, dense: bool) -> None:
    changes = {} if dense else {"adapter": str(distill(recipes, tmp_path / "recovered"))}
    finetune(recipes, tmp_path / "one", batch_size=2, **changes)
    in_two("finetune", tmp_path / "two", fsdp2=fsdp2, **changes)
    losses = {}
    for run in ("one", "two"):
        state = json.loads((tmp_path / run / "checkpoint-4" / "trainer_state.json").read_text())
        losses[run] = [x.get("loss", x.get("eval_loss")) for x in state["log_history"]]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert_same_adapter(tmp_path / "two", tmp_path / "one")


def test_recover_refuses_plans(recipes: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["recover.py", "plan=plan.json"])
    with pytest.raises(SystemExit):
        recipes("recover").main()
    assert "plan= is for distill.py" in capsys.readouterr().err


def test_the_report_compares_the_recovered_model_with_its_parts(recipes: Any, tmp_path: Path) -> None:
    recover, settings = recipes("recover"), recipes("settings")
    config = settings.DistillConfig(**{**SMALL, "out": str(tmp_path / "run"), "distill_steps": 2})
    adapter = recipes("distill").run(config, load)
    others = tmp_path / "other.txt"
    others.write_text(Path(SMALL["documents"]).read_text(encoding="utf-8")[:3000])
    results = recover.measure(config, adapter, load, [str(others)], 32, 3)
    of = f"{Path(SMALL['documents']).name}, held out"
    assert list(results) == [of, "other.txt"]
    names = ["dense", "its window alone, untrained", "recovered", "recovered, window alone"]
    for found in results.values():
        assert list(found) == [*names, "recovered, linear part alone"]
        assert len(set(found.values())) == 5  # each is another model
    dense, tokenizer = load("")
    windows = recover.unseen(config, tokenizer, [], 32, 3)[of]
    with torch.inference_mode():
        losses = [dense(ids[None], labels=ids[None]).loss for ids in windows]
    assert torch.stack(losses).mean().exp().item() == pytest.approx(results[of]["dense"], rel=1e-4)
    text = recover.report(results, 32)
    assert "| dense |" in text
    assert "left of the window's gap" in text
    log = [json.loads(line) for line in (adapter.parent / "log.jsonl").read_text().splitlines()]
    recipes("plots").training(log, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["bfloat16", None])
def test_the_adapter_has_the_type_that_was_asked_for(recipes: Any, tmp_path: Path, kind: str | None) -> None:
    settings = recipes("settings")
    config = settings.DistillConfig(**{**SMALL, "out": str(tmp_path), "distill_steps": 1, "adapter_dtype": kind})
    adapter = recipes("distill").run(config, load)
    found = {x.dtype for path in adapter.glob("*.safetensors") for x in load_file(path).values()}
    assert found == {torch.float32 if kind is None else torch.bfloat16}
    with pytest.raises(ValueError, match="adapter_dtype='int8'; valid: float32, bfloat16, float16 or null"):
        settings.DistillConfig(adapter_dtype="int8")
