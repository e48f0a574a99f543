"""The laws over every supported family: identity, one answer, padding, generation, reversal, saving."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from matrix import DEFAULTS, Case, left_padded, positions_of, shake, through, tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hf_effattn
from hf_effattn.architectures import REFUSED
from hf_effattn.architectures.seam import find_seam
from hf_effattn.targets import choose_layers, find_targets

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in hf_effattn.supported_models() if name in CONFIG_MAPPING},
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-multihead": ("falcon", {"multi_query": False}),
    "gpt_bigcode-multihead": ("gpt_bigcode", {"multi_query": False}),
}
# Families that learn positions from BERT's line count them from the token ids, with an offset.
COUNT_THEIR_POSITIONS = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
# Decoders that number positions by column, so their own logits change with left padding.
PLACED_BY_COLUMN = ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart", "whisper")
# Some of their layers, recurrent ones or windows that stay as they are, let packed documents meet, dense or converted.
LET_DOCUMENTS_MEET = (
    "afmoe",
    "bailing_hybrid",
    "kimi_linear",
    "lara_mini",
    "lfm3",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)
SLOW = ("kimi_linear",)  # its own recurrent layers take seconds
every_family = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
)
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)
PINNED = families.README.with_name("constraints.txt").read_text().split()
IDS = tokens(2, 30)
ROWS = [tokens(11, seed=3), tokens(25, seed=4)]
WIDE = Case("wide", "sparse", {"window": 64, "num_sinks": 2})


def in_turn(variants: Iterable[str]) -> list[tuple[str, Case]]:
    """Each family with one of the default cases, for laws that a family may break, or a mechanism, but hardly both."""
    return [(variant, DEFAULTS[index % len(DEFAULTS)]) for index, variant in enumerate(variants)]


def made(variant: str) -> PreTrainedModel:
    model_type, changes = VARIANTS[variant]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(families.tiny_config(model_type, **changes)).eval()


@functools.lru_cache(maxsize=4)
def model_of(variant: str, case: Case | None) -> PreTrainedModel:
    model = made(variant)
    return shake(model.convert_attention(case.mechanism, **case.options)) if case else model


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def padded(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of `ROWS` in one left-padded batch."""
    ids, mask = left_padded(ROWS)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    own_positions = not takes_positions or model.config.model_type.removeprefix("effattn_") in COUNT_THEIR_POSITIONS
    options = {} if own_positions else {"position_ids": positions_of(mask)}
    out = logits(model, ids, attention_mask=mask, use_cache=False, **options)
    return [out[index, -len(row) :] for index, row in enumerate(ROWS)]


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit: random models of some families have logits in the tens."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, atol=1e-5 * scale, rtol=0)


@every_family
def test_a_window_longer_than_the_text_changes_nothing(variant: str) -> None:
    dense, converted = model_of(variant, None), model_of(variant, WIDE)
    near(logits(converted, use_cache=False), logits(dense, use_cache=False))
    for actual, expected in zip(padded(converted), padded(dense), strict=True):
        near(actual, expected)


def in_chunks(model: PreTrainedModel) -> torch.Tensor:
    """Logits of `IDS` that come in chunks of several sizes, through one cache."""
    cache, cuts = DynamicCache(config=model.config), ((0, 9), (9, 10), (10, 11), (11, 25), (25, 30))
    return torch.cat([logits(model, IDS[:, a:b], **through(cache)) for a, b in cuts], dim=1)


@defaults
@every_family
def test_one_answer(variant: str, case: Case) -> None:
    dense, model = model_of(variant, None), model_of(variant, case)
    full, natively = logits(model, use_cache=False), logits(dense, use_cache=False)
    assert not torch.allclose(full, natively, atol=1e-4), "nothing was converted"
    near(in_chunks(model), full)


@pytest.mark.parametrize(("variant", "case"), in_turn(VARIANTS), ids=str)
def test_one_answer_beside_softmax(variant: str, case: Case) -> None:
    """transformers sizes the masks of all layers by the cache of one, which must not be ours."""
    model = made(variant)
    first = choose_layers(find_targets(model), None, None)[0]
    shake(model.convert_attention(case.mechanism, **case.options, layers=[first]))
    near(in_chunks(model), logits(model, use_cache=False))


def packed(model: PreTrainedModel, rows: list[torch.Tensor]) -> torch.Tensor:
    """Logits of `rows`, packed into one row, whose positions tell where they begin."""
    counts = model.config.model_type.removeprefix("effattn_") in COUNT_THEIR_POSITIONS
    first = model.config.pad_token_id + 1 if counts else 0
    positions = torch.cat([torch.arange(len(row)) + first for row in rows])
    return logits(model, torch.cat(rows)[None], position_ids=positions[None], use_cache=False)


@pytest.mark.parametrize(
    ("variant", "case"),
    in_turn(x for x in VARIANTS if x not in PLACED_BY_COLUMN and x not in LET_DOCUMENTS_MEET),
    ids=str,
)
def test_packed_documents_do_not_see_each_other(variant: str, case: Case) -> None:
    """Also where the family's own layers let them."""
    model = model_of(variant, case)
    near(packed(model, ROWS), torch.cat([packed(model, [row]) for row in ROWS], dim=1))


POSITIONS_ALONE = ("opt", "falcon", "roberta")
of_the_pinned_version = pytest.mark.skipif(
    f"transformers=={transformers.__version__}" not in PINNED, reason="others make masks for these families, or not"
)


@of_the_pinned_version
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("variant", "case"), in_turn(POSITIONS_ALONE), ids=str)
def test_compiled_models_that_know_documents_by_positions_alone_refuse_them(variant: str, case: Case) -> None:
    torch._dynamo.reset()
    model = model_of(variant, case)
    compiled = torch.compile(model, backend="aot_eager")
    near(packed(compiled, ROWS[:1]), packed(model, ROWS[:1]))
    with pytest.raises(RuntimeError, match="one document a row: position_ids must grow"):
        packed(compiled, ROWS)


@of_the_pinned_version
@pytest.mark.slow
@pytest.mark.parametrize("variant", POSITIONS_ALONE)
def test_exported_models_that_know_documents_by_positions_alone_refuse_them(variant: str) -> None:
    model = model_of(variant, DEFAULTS[0])
    one, two = torch.arange(30)[None] + 2, torch.cat((torch.arange(11), torch.arange(19)))[None] + 2
    with torch.no_grad():
        options = {"position_ids": one, "use_cache": False}
        program = torch.export.export(model, (IDS[:1],), options, strict=False).module()
        near(program(IDS[:1], **options).logits, model(IDS[:1], **options).logits)
        with pytest.raises(RuntimeError, match="one document a row"):
            program(IDS[:1], position_ids=two, use_cache=False)


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param(*pair, marks=pytest.mark.slow) if pair[0] in SLOW else pair
        for pair in in_turn(x for x in LET_DOCUMENTS_MEET if x in VARIANTS)
    ],
    ids=str,
)
def test_where_documents_meet_they_do_so_in_the_dense_model(variant: str, case: Case) -> None:
    apart = []
    for model in (model_of(variant, None), model_of(variant, case)):
        alone = torch.cat([packed(model, [row]) for row in ROWS], dim=1)
        apart.append(torch.allclose(packed(model, ROWS), alone, atol=1e-3))
    assert apart[1] or not apart[0]
    if f"transformers=={transformers.__version__}" in PINNED:
        assert not apart[0], "off the list"


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "case"), in_turn(x for x in VARIANTS if x not in PLACED_BY_COLUMN), ids=str)
def test_padding_changes_nothing(variant: str, case: Case) -> None:
    model = model_of(variant, case)
    for actual, row in zip(padded(model), ROWS, strict=True):
        near(actual, logits(model, row[None], use_cache=False)[0])


@pytest.mark.parametrize("variant", PLACED_BY_COLUMN)
def test_left_padding_moves_the_positions_of_these_models_themselves(variant: str) -> None:
    dense = model_of(variant, None)
    alone = [logits(dense, row[None], use_cache=False)[0] for row in ROWS]
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(padded(dense), alone, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "case"), in_turn(VARIANTS), ids=str)
def test_generation_with_the_cache_is_generation_without(variant: str, case: Case) -> None:
    model = model_of(variant, case)
    ids, mask = left_padded(ROWS)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        expected = model.generate(ids, use_cache=False, num_beams=beams, **options)
        assert torch.equal(model.generate(ids, num_beams=beams, **options), expected)


@pytest.mark.slow
@every_family
def test_conversion_is_saved_and_undone(variant: str, tmp_path: Path) -> None:
    model = made(variant)
    before, kind, config = logits(model, use_cache=False), type(model), model.config.to_dict()
    shake(model.convert_attention("linear", window=6, num_sinks=2))
    expected = logits(model, use_cache=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded, use_cache=False), expected, atol=1e-6, rtol=0)
    assert str(loaded.attention_report(100)) == str(model.attention_report(100))
    with pytest.raises((StrictDataclassError, ValueError)):  # by the guard, or by a check of the family before it
        kind.from_pretrained(tmp_path)
    model.revert_attention()
    assert type(model) is kind
    assert torch.equal(logits(model, use_cache=False), before)
    after = model.config.to_dict()
    assert {**after, "architectures": None, "dtype": None} == {**config, "architectures": None, "dtype": None}


@pytest.mark.slow
@every_family
def test_the_report_is_what_the_cache_holds(variant: str) -> None:
    for case in DEFAULTS:
        model = model_of(variant, case)
        cache = DynamicCache(config=model.config)
        logits(model, IDS[:1], **through(cache))
        for layer in model.attention_report(30).layers:
            if not layer.mechanism.startswith("softmax"):
                assert cache.layers[layer.index].nbytes() == layer.cache_bytes


@pytest.mark.parametrize("model_type", [name for name in REFUSED if name in CONFIG_MAPPING and name != "mamba2"])
def test_refused_families_say_why(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.tiny_config(model_type))
    with pytest.raises(ValueError, match=re.escape(REFUSED[model_type])):
        model.convert_attention("linear")


def test_a_composite_model_names_its_text_model() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3"]())
    with pytest.raises(ValueError, match=r"'gemma3' are not supported\. Convert its text model \(type 'gemma3_text'\)"):
        model.convert_attention("linear")


@pytest.mark.parametrize("softcap", [30.0, None])
def test_the_seam_itself_tells_soft_capping(softcap: float | None) -> None:
    """A family that nobody listed is still judged by what its attention passes on."""
    model = AutoModelForCausalLM.from_config(families.tiny_config("gemma2", attn_logit_softcapping=softcap))
    module = model.model.layers[0].self_attn
    problems = list(find_seam(type(module)).problems(module))
    expected = "it passes softcap=self.attn_logit_softcapping, which changes the scores"
    assert problems == ([expected] if softcap else [])


def test_layers_with_a_window_of_their_own_stay_unless_asked_for() -> None:
    model = AutoModelForCausalLM.from_config(families.tiny_config("gemma3_text")).eval()
    kinds = [layer.mechanism for layer in model.convert_attention("linear").attention_report(9000).layers]
    assert kinds[0] == "softmax (window=4096, its own)"
    assert kinds[1].startswith("linear")
    model.convert_attention("linear", layers=[0])
    assert all(x.mechanism.startswith("linear") for x in model.attention_report().layers)
    all_windows = AutoModelForCausalLM.from_config(families.tiny_config("mistral", sliding_window=8))
    all_windows.convert_attention("linear")
    assert all(x.mechanism.startswith("linear") for x in all_windows.attention_report().layers)


def test_layers_without_softmax_attention_are_named() -> None:
    model = AutoModelForCausalLM.from_config(families.tiny_config("qwen3_next"))
    with pytest.raises(ValueError, match="layer 0, which is of type 'linear_attention'.*valid: 1"):
        model.convert_attention("linear", layers=[0])
    model.convert_attention("linear")
    assert [layer.index for layer in model.attention_report().layers] == [1]


@pytest.mark.skipif(f"transformers=={transformers.__version__}" not in PINNED, reason="lists those of the pinned one")
def test_the_readme_lists_the_families() -> None:
    found = families.SECTION.search(families.README.read_text())
    assert found is not None
    assert found.group() == families.listing(), "run: python tests/families.py"


def test_enough_families_are_supported() -> None:
    assert len(hf_effattn.supported_models()) >= 95
