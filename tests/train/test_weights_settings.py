"""Settings of weights of low rank that are refused, and those by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subspan.train.config import PretrainConfig
from subspan.train.optimizer import check_settings
from subspan.train.plan import plan_recipe
from subspan.train.plan_settings import PlanSettings
from subspan.train.run_folder import shared_batch
from subspan.train.weights import batch_shares
from tests.train.low_rank_runs import built, low_rank, small
from tests.train.micro import run

pytestmark = pytest.mark.usefixtures("one_layer")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "mhlor"}, "did you mean 'mhlora'"),
        ({"weights": "mhlora", "weight_settings": {"head": 2}}, "did you mean 'heads'"),
        ({"weights": "mhlora", "weight_settings": {"heads": "two"}}, "weight_settings"),
        ({"weights": "mhlora", "weight_settings": {"heads": 0}}, "heads is 0; it must be at least 1"),
        ({"weights": "relora", "weight_settings": {"rank": "two"}}, "rank is 'two'; it must be a whole number"),
        ({"weights": "lte", "weight_settings": {"heads": 3}}, "batch_size is 4, which 3 parallel heads"),
        ({"weight_settings": {"heads": 2}}, "choose a recipe with --weights"),
        ({"adapter_settings": {"r": 2}}, "choose one with --adapter"),
        ({"adapter": "lorra"}, "did you mean 'lora'"),
        ({"adapter": "lora", "adapter_settings": {"lora_dropou": 0.1}}, "did you mean 'lora_dropout'"),
        ({"adapter": "lora", "adapter_settings": {"target_modules": "all"}}, "give --target_modules instead"),
        ({"adapter": "lora", "adapter_settings": {"r": "two"}}, "adapter_settings.r is 'two'; it must be a number"),
        ({"weights": "relora", "weight_settings": {"full_rank_steps": 800}}, "no factor would ever be trained"),
        ({"weights": "relora", "weight_settings": {"restart_every": 5, "rewarm": 5}}, "longer than their re-warming"),
        ({"adapter": "hra", "adapter_settings": {"lora_plus_ratio": 4}}, "has no A and B"),
        ({"adapter": "lora", "adapter_settings": {"lora_plus_ratio": 0}}, "greater than 0"),
        ({"adapter": "lora", "weights": "mhlora"}, "only relora, periodic_lora can restart an adapter"),
        ({"weights": "mhlora", "rank": 4}, "--weight_settings.rank is that of factors"),
        ({"weights": "mhlora", "method": "galore"}, "give --project factors, others or merged"),
        ({"weights": "mhlora", "method": "scale"}, "takes adamw or a method that has a rank"),
        ({"weights": "mhlora", "project": "factors"}, "the method 'adamw' projects nothing"),
        ({"project": "factors"}, "weights is 'dense': leave project out"),
        ({"weights": "mhlora", "method": "galore", "project": "factors", "rank": 32}, "must be smaller"),
        ({"adapter": "lora", "method": "galore", "project": "others"}, "leave it out"),
        ({"weights": "mhlora", "gradient": "fused", "max_grad_norm": 0.0}, "gradient is 'fused'"),
        ({"weights": "mhlora", "gradient": "projected"}, "gradient is 'projected'"),
        ({"weights": "mhlora", "weight_storage": "int8"}, "weight_storage is 'int8'"),
        ({"weights": "relora", "shard": "full"}, "whole matrices take up the factors between steps"),
        ({"weights": "lte", "shard": "full"}, "it divides its heads over the processes"),
        ({"weights": "factored", "shard": "full"}, "rebalance_gap=200: that takes whole factors and moments; give 0"),
        ({"adapter": "lora", "shard": "full"}, "adapter 'lora' cannot be divided over processes"),
        ({"adapter": "lora", "chunked_loss": True}, "chunked_loss is True"),
        ({"weights": "lte", "batch_size": 6}, "batch_size is 6, which 4 parallel heads cannot divide evenly"),
        ({"project": "none"}, "project is 'none'; it must be factors, others or merged"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(PretrainConfig(**given), 2 if given.get("shard") else 1)


def test_what_several_processes_with_heads_of_their_own_refuse() -> None:
    given = {"weights": "lte", "batch_size": 4, "weight_settings": {"heads": 4, "merge_every": 10}}
    given |= {"steps": 100, "eval_every": 50, "method": "galore", "project": "others", "rank": 4}
    check_settings(PretrainConfig(**given), 2)
    with pytest.raises(ValueError, match="rank_policy is 'tolerance', which gives copies"):
        check_settings(PretrainConfig(**given, optimizer={"rank_policy": "tolerance"}), 2)
    given |= {"method": "q_galore", "weight_storage": "float"}
    check_settings(PretrainConfig(**given), 2)
    check_settings(PretrainConfig(**given | {"project": "factors", "rank": 2}), 1)
    with pytest.raises(ValueError, match="method is 'q_galore', which gives heads in several processes gaps of their"):
        check_settings(PretrainConfig(**given | {"project": "factors", "rank": 2}), 2)
    with pytest.raises(ValueError, match="processes share parallel heads: plan one of them"):
        plan_recipe(PlanSettings(model="llama_9m", weights="lte", batch_size=4, world_size=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_modules": "logit", "chunked_loss": True}, "chunked_loss is true"),
        ({"target_modules": "convolution"}, "selects no matrix"),
        ({"method": "galore", "project": "factors", "rank": 6, "weight_settings": {"rank": 8, "heads": 2}}, None),
        ({"method": "galore", "project": "others", "rank": 32}, "the rank must be smaller than its sides"),
    ],
)
def test_settings_that_do_not_fit_the_model(tmp_path: Path, given: dict[str, Any], message: str | None) -> None:
    changes = {"weights": "mhlora", "weight_settings": small("mhlora")} | given
    if message is None:
        built(tmp_path, **changes)
        return
    with pytest.raises(ValueError, match=message):
        built(tmp_path, **changes)


def test_heads_that_cannot_divide_a_batch_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    changes = low_rank("lte", batch_size=3, data=str(tmp_path / "nowhere"), output=str(tmp_path / "none"))
    for resume in ("none", "auto"):
        with pytest.raises(ValueError, match="batch_size is 3, which 2 parallel heads cannot divide evenly"):
            run(tmp_path, resume=resume, **changes)
    assert not (tmp_path / "none").exists()
    # Two processes with a head each, continued by one with both.
    config = PretrainConfig(**low_rank("lte", batch_size=1, resume="auto"))
    check_settings(config, 1)
    assert shared_batch(config, then=2, now=1, shares=batch_shares(config, 1)) == (2, 1)


def test_the_method_by_default() -> None:
    assert PretrainConfig().method == "galore" and PretrainConfig(weights="mhlora").method == "adamw"
    assert PlanSettings(adapter="lora").method == "adamw" and PlanSettings().method == "galore"
