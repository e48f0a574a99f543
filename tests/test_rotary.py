"""Queries and keys before rotary: found for every family that rotates in a way that is understood, else refused."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from matrix import tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import hf_effattn
from hf_effattn.architectures import ARCHITECTURES, find_undo
from hf_effattn.architectures.rotary import UNDERSTOOD

FAMILIES = [name for name in hf_effattn.supported_models() if name in CONFIG_MAPPING]
# What they do is more than one unconditional rotation of the first dimensions: the reason is in the message.
REFUSED = (
    "afmoe axk1 bailing_hybrid beam cohere2 cohere2_moe deepseek_v2 deepseek_v3 exaone4 exaone_moe falcon gemma4_text "
    "gemma4_unified_text glm4_moe_lite gptj kolibri1 lara_mini llama4_text longcat_flash minicpm3 moshi olmo_hybrid "
    "smollm3 youtu"
).split()


def made(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(families.tiny_config(name)).eval()


@pytest.mark.parametrize("left", ["query_states, key_states", "(query_states, key_states)", "query_rot, key_rot"])
def test_every_python_writes_the_rotation_in_a_way_that_is_understood(left: str) -> None:
    """3.10 has brackets around the left side of an assignment, later ones have none."""
    assert UNDERSTOOD.fullmatch(f"{left} = apply_rotary_pos_emb({left.strip('()')}, cos, sin)")
    assert not UNDERSTOOD.fullmatch(f"{left} = apply_rotary_pos_emb({left.strip('()')}, cos, sin, 1)")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
@torch.no_grad()
def test_the_rotation_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name).convert_attention("linear", feature_map="cosformer", window=0)
    converted = [module for module in model.modules() if hasattr(module, "effattn")]
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[-1].append(tuple(x.clone() for x in kwargs["before_rotary"]))

    def stand_still(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    converted[0].effattn.register_forward_pre_hook(record, with_kwargs=True)
    for _ in range(2):
        seen.append([])
        model(tokens(2, 9), use_cache=False)
        if converted[0].effattn.undo_rotary is None:
            return
        converted[0].register_forward_pre_hook(stand_still, with_kwargs=True, prepend=True)
    for actual, expected in zip(seen[0][0], seen[1][0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in FAMILIES])
def test_what_is_not_understood_is_refused(name: str) -> None:
    model = made(name)
    with pytest.raises(ValueError, match="before rotary"):
        model.convert_attention("linear", feature_map="cosformer")
    assert not any(hasattr(module, "effattn") for module in model.modules())


def test_a_family_without_rotary_needs_nothing() -> None:
    model = made("gpt2")
    module = ARCHITECTURES.get("gpt2").attention_modules(model)[0]
    assert find_undo(ARCHITECTURES.get("gpt2"), module) is None
