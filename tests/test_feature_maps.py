"""Feature maps, found in the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import tiny_model, tokens
from torch.nn import functional

from hf_effattn.feature_maps import FEATURE_MAPS, FeatureMap, map_options
from hf_effattn.notation import compute_dtype

ROOT = Path(__file__).parents[1]
AT = torch.tensor([[0, 1, 2, 50, 51]])
every_map = pytest.mark.parametrize("name", list(FEATURE_MAPS))


def make(name: str) -> FeatureMap:
    return FEATURE_MAPS.get(name)(head_dim=8, num_heads=3)


@every_map
def test_features_have_their_shape_and_products_that_are_not_negative(name: str) -> None:
    feature_map = make(name)
    features = feature_map(torch.randn(2, 3, 5, 8), AT)
    assert features.shape == (2, 3, 5, feature_map.feature_dim)
    assert (features @ features.transpose(2, 3) >= -1e-6).all()
    assert feature_map.flops_per_token > 0


@every_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_keep_the_dtype_and_stay_finite(name: str, dtype: torch.dtype) -> None:
    x = (30 * torch.randn(2, 3, 5, 8, dtype=dtype)).requires_grad_()
    features = make(name).to(dtype)(x, AT)
    assert features.dtype == compute_dtype(dtype)
    assert features.isfinite().all()
    products = features @ features.transpose(2, 3)
    assert products.isfinite().all()
    weights = products / products.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    (gradient,) = torch.autograd.grad(weights.square().sum(), x)
    assert gradient.isfinite().all()


@every_map
def test_one_token_at_a_time_is_all_at_once(name: str) -> None:
    feature_map, x = make(name), torch.randn(2, 3, 5, 8)
    one = torch.cat([feature_map(x[:, :, t : t + 1], AT[:, t : t + 1]) for t in range(5)], dim=2)
    torch.testing.assert_close(one, feature_map(x, AT))


@every_map
def test_gradients_reach_input_and_parameters(name: str) -> None:
    feature_map, x = make(name).double(), torch.randn(1, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: feature_map(x, AT), (x,))
    feature_map(x, AT).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in feature_map.parameters())


@every_map
def test_reset_gives_the_documented_start(name: str) -> None:
    feature_map, fresh = make(name), make(name)
    with torch.no_grad():
        for parameter in feature_map.parameters():
            parameter.normal_()
    feature_map.reset_parameters()
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(feature_map(x, AT), fresh(x, AT))


@every_map
def test_each_map_names_its_paper(name: str) -> None:
    assert "arXiv" in (FEATURE_MAPS.get(name).__doc__ or "")


@every_map
def test_queries_and_keys_start_from_one_matrix(name: str) -> None:
    """Else a query's product with the key it resembles would mean nothing."""
    many, few = FEATURE_MAPS.get(name)(8, 4), FEATURE_MAPS.get(name)(8, 1)
    x = torch.randn(1, 1, 5, 8)
    for head in many(x.expand(1, 4, 5, 8), AT).unbind(1):
        torch.testing.assert_close(head, few(x, AT)[:, 0])


def products(name: str, q: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
    feature_map = FEATURE_MAPS.get(name)(q.shape[-1], 1, **options).double()
    return (feature_map(q, AT[:, : q.shape[2]]) @ feature_map(k, AT[:, : k.shape[2]]).transpose(2, 3)).detach()


def vectors(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 1, 4, dim, dtype=torch.float64), torch.randn(1, 1, 5, dim, dtype=torch.float64)


def test_taylor_is_the_series_of_the_exponential() -> None:
    q, k = vectors(16)  # the projection is then a rotation
    s = q @ k.transpose(2, 3) / 4
    torch.testing.assert_close(products("taylor", q, k), 1 + s + s.square() / 2, atol=1e-6, rtol=1e-6)


def test_performer_estimates_the_exponential() -> None:
    q, k = (x / 2 for x in vectors(16))
    expected = (q @ k.transpose(2, 3) / 4).exp()
    error = (products("performer", q, k, feature_dim=4096) - expected).abs() / expected
    assert error.mean() < 0.1


def test_rebased_is_one_and_a_square() -> None:
    q, k = vectors(16)
    rotation = FEATURE_MAPS.get("rebased")(16, 1).get_parameter("weight")[0].T.detach().double()
    y, z = (functional.layer_norm(x @ rotation, (16,)) for x in (q, k))
    torch.testing.assert_close(products("rebased", q, k), 1 + (y @ z.transpose(2, 3)).square() / 16)


def test_cosformer_weighs_by_the_cosine_of_the_distance() -> None:
    q, k = vectors(8)
    at = AT[0, :4].double()
    distance = at[:, None] - AT[0].double()
    expected = (q.relu() @ k.relu().transpose(2, 3)) * (torch.pi / 2 / 100 * distance).cos()
    torch.testing.assert_close(products("cosformer", q, k, max_position=100), expected)


def test_dpfp_multiplies_rolled_neighbours() -> None:
    x = torch.tensor([[[[1.0, -2.0]]]])
    assert FEATURE_MAPS.get("dpfp")(2, 1, nu=3)(x).tolist() == [[[[2.0] + 10 * [0.0] + [2.0]]]]


@pytest.mark.parametrize(
    ("name", "option", "wrong"),
    [("t2r", "feature_dim", 0), ("performer", "feature_dim", -1), ("dpfp", "nu", 16), ("taylor", "projection_dim", 0)]
    + [("rebased", "projection_dim", 1), ("cosformer", "max_position", 0)],
)
def test_a_wrong_option_of_a_map_is_named(name: str, option: str, wrong: int) -> None:
    assert option in map_options(name)
    with pytest.raises(ValueError, match=option):
        FEATURE_MAPS.get(name)(8, 3, **{option: wrong})


@every_map
def test_the_readme_lists_every_map(name: str) -> None:
    assert f"| `{name}`" in (ROOT / "README.md").read_text()


def test_the_example_for_contributors_is_a_feature_map() -> None:
    example = (ROOT / "CONTRIBUTING.md").read_text().partition("```python\n")[2].partition("```")[0]
    try:
        exec(compile(example.replace("from .base", "from hf_effattn.feature_maps.base"), "square", "exec"))
        net = tiny_model("llama-gqa").convert_attention("linear", feature_map="square")
        ids = tokens(2, 100)
        cached = net.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(cached, net.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    finally:
        FEATURE_MAPS._entries.pop("square")
