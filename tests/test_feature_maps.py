"""Feature maps, found in the registry."""

from __future__ import annotations

import pytest
import torch

from hf_effattn.feature_maps import FEATURE_MAPS, FeatureMap

every_map = pytest.mark.parametrize("name", list(FEATURE_MAPS))


def make(name: str) -> FeatureMap:
    return FEATURE_MAPS.get(name)(head_dim=8, num_heads=3)


@every_map
def test_features_have_their_shape_and_are_non_negative(name: str) -> None:
    feature_map = make(name)
    features = feature_map(torch.randn(2, 3, 5, 8))
    assert features.shape == (2, 3, 5, feature_map.feature_dim)
    assert (features >= 0).all()
    assert feature_map.flops_per_token > 0


@every_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_keep_the_dtype_and_stay_finite(name: str, dtype: torch.dtype) -> None:
    features = make(name).to(dtype)(30 * torch.randn(2, 3, 5, 8, dtype=dtype))
    assert features.dtype == dtype
    assert features.isfinite().all()


@every_map
def test_one_token_at_a_time_is_all_at_once(name: str) -> None:
    feature_map, x = make(name), torch.randn(2, 3, 5, 8)
    one = torch.cat([feature_map(x[:, :, t : t + 1]) for t in range(5)], dim=2)
    torch.testing.assert_close(one, feature_map(x))


@every_map
def test_gradients_reach_input_and_parameters(name: str) -> None:
    feature_map, x = make(name).double(), torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(feature_map, (x,))
    feature_map(x).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in feature_map.parameters())


@every_map
def test_reset_gives_the_documented_start(name: str) -> None:
    feature_map, fresh = make(name), make(name)
    with torch.no_grad():
        for parameter in feature_map.parameters():
            parameter.normal_()
    feature_map.reset_parameters()
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(feature_map(x), fresh(x))


@every_map
def test_each_map_names_its_paper(name: str) -> None:
    assert "arXiv" in (FEATURE_MAPS.get(name).__doc__ or "")
