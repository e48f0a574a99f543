"""Tensor parallelism: two processes that share the heads of a converted model compute what one does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from matrix import DEFAULTS, Case
from test_distributed import in_processes
from transformers import AutoModelForCausalLM

from hf_effattn import LinearConfig, SparseConfig
from hf_effattn.attention import HeadGeometry, make_mechanism
from hf_effattn.integration import tensor_parallel
from hf_effattn.patterns import PATTERNS, Pattern, Retention
from hf_effattn.patterns.base import register_pattern


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_processes(["tensor_parallel"], tmp_path_factory.mktemp("tensor_parallel"))


def assert_same(actual: worker.Outcome, net: torch.nn.Module) -> None:
    expected = worker.results_of(net, worker.steps()[0])
    torch.testing.assert_close(actual["logits"], expected["logits"], atol=1e-5, rtol=1e-5)
    assert torch.equal(actual["generated"], expected["generated"])
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():  # some have entries up to 80
        tolerance = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(actual["gradients"][name], gradient, atol=tolerance, rtol=0, msg=name)


def is_shared_out(case: Case) -> bool:
    """Whether heads are alike, as the options say."""
    return "recurrence" not in case.options and not case.name.startswith(("bigbird", "windows"))


@pytest.mark.slow
@pytest.mark.parametrize("case", worker.SHARED_OUT, ids=str)
def test_half_of_the_heads_in_each_process_are_the_whole(case: Case, outcomes: Path) -> None:
    actual = torch.load(outcomes / f"{case.name}.pt")
    if not is_shared_out(case):
        assert "cannot be shared out by tensor parallelism" in actual["refused"]
        return
    net = worker.shareable(case)
    assert_same(actual, net)
    saved = AutoModelForCausalLM.from_pretrained(outcomes / f"{case.name} again")
    assert type(saved) is type(net)
    for name, parameter in net.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter)


@pytest.mark.slow
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_model_that_is_shared_out_can_be_converted_and_reverted(case: Case, outcomes: Path) -> None:
    net = worker.shareable()
    assert_same(torch.load(outcomes / f"{case} reverted.pt"), net)
    net.zero_grad()
    assert_same(torch.load(outcomes / f"{case} later.pt"), net.convert_attention(case.mechanism, **case.options))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["loaded", "later"])
@pytest.mark.parametrize("family", worker.WHOLE_HEADS)
def test_heads_that_stay_in_all_processes_are_not_shared_out(family: str, way: str, outcomes: Path) -> None:
    assert_same(torch.load(outcomes / f"{family} {way}.pt"), worker.shareable(DEFAULTS[0], family))


@pytest.mark.parametrize("with_own", [True, False])
def test_copies_of_what_is_shared_out_have_parameters_of_their_own(with_own: bool) -> None:
    """As a process of one group does it; what is copied or pickled computes with its own parameters."""
    made = make_mechanism(LinearConfig(window=0), HeadGeometry(4, 2, 16, 16))
    made.share_heads(2)
    made.register_forward_pre_hook(tensor_parallel._take_own)
    made.register_forward_hook(tensor_parallel._give_back, always_call=True)
    copied = copy.deepcopy(made) if with_own else pickle.loads(pickle.dumps(made))
    for mechanism in (made, copied):
        for parameter in mechanism.parameters():  # those of the heads of one process
            parameter.data = torch.randn_like(parameter)[: len(parameter) // 2]
    inputs = [torch.randn(1, heads, 9, 16) for heads in (2, 1, 1)]
    copied(*inputs, scale=0.25).sum().backward()
    assert all(p.grad is None for p in made.parameters())
    assert all(p.grad is not None for p in copied.parameters())
    with pytest.raises(ValueError, match="converted for"):
        copied(*[x[..., :8] for x in inputs], scale=0.25)
    assert not hasattr(copied, "put_aside")


def test_patterns_of_which_nothing_is_known_are_not_shared_out() -> None:
    @register_pattern("by_head")
    def by_head(window: int) -> Pattern:
        """A window for the first head alone (test only)."""
        return Pattern(lambda b, h, q, k: (k <= q) & ((h > 0) | (q - k < window)), Retention())

    try:
        mechanism = make_mechanism(SparseConfig(pattern="by_head", window=3), HeadGeometry(4, 2, 16, 16))
        with pytest.raises(ValueError, match="cannot be shared out by tensor parallelism: its heads may differ"):
            mechanism.check_shares(2)
    finally:
        del PATTERNS._entries["by_head"]


def test_heads_must_be_divisible() -> None:
    mechanism = make_mechanism(SparseConfig(window=4), HeadGeometry(6, 3, 16, 16))
    mechanism.share_heads(3)
    with pytest.raises(ValueError, match="3 key/value heads cannot be shared out over 2 processes"):
        mechanism.share_heads(2)
