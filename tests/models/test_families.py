"""Compare every family with transformers in every layout, and config.json in both directions."""

from __future__ import annotations

import json

import pytest

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.models.huggingface.config_json import config_from_model, model_from_config
from tests.helpers.ranks import run_ranks
from tests.losses.cases import fresh_seed
from tests.models.families import FAMILIES, LAYOUTS, Conversion, convert_all
from tests.models.folders import MODEL


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    return run_ranks(convert_all, 2, tmp_path_factory.mktemp("families"), fresh_seed())[0]


@pytest.mark.dist
@pytest.mark.parametrize("name", FAMILIES)
def test_families_agree_with_transformers(converted: dict[str, Conversion], name: str) -> None:
    conversion = converted[name]
    assert conversion.scale > 1.0, "logits too small to tell models apart"
    for layout in LAYOUTS:
        assert conversion.difference[layout] <= 1e-4, (layout, conversion)
    assert conversion.same_weights
    assert conversion.exported_difference == 0.0


def test_model_section_survives_config_json() -> None:
    tied = {"tied_embeddings": True, "rope_base": 5e5, "norm_eps": 1e-6}
    scaled = {
        "rope_scaling_factor": 32.0,
        "rope_original_length": 4096,
        "rope_low_frequency_factor": 2.0,
    }
    for changes in (
        tied,
        scaled,
        {"qk_norm": True, "qkv_bias": False, "head_dim": 8},
        {"qkv_bias": False, "sliding_window": 32},
    ):
        model = ModelSection.model_validate(
            {**MODEL.model_dump(), "vocab_size_multiple": 128, "head_dim": 4, **changes}
        )
        config = config_from_model(model, vocab_size=50, dtype="float32", max_positions=64)
        assert model_from_config(json.loads(json.dumps(config)), setting="test") == model


def test_models_that_no_family_has() -> None:
    for changes, message in (
        ({"qk_norm": True}, "both model.qk_norm and model.qkv_bias"),
        ({"mcore": {"x": 1}}, "model.mcore"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_from_model(
                MODEL.model_copy(update=changes), vocab_size=50, dtype="float32", max_positions=64
            )
