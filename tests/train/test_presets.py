from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from subspan.optim import GaLore
from subspan.train.presets import PRESETS, build_model, model_tokenizer, preset_config
from tests.train.micro import write_model

# Parameters in millions with a vocabulary of 32,000, counted from the sizes by hand:
# 2·V·h + L·(4·h² + 3·h·f + 2·h) + h.
LLAMA = {
    "llama_9m": (128, 352, 4, 4),
    "llama_20m": (256, 688, 4, 4),
    "llama_35m": (384, 1024, 6, 8),
    "llama_40m": (416, 1024, 8, 8),
    "llama_60m": (512, 1376, 8, 8),
    "llama_100m": (640, 1708, 12, 10),
    "llama_130m": (768, 2048, 12, 12),
    "llama_250m": (768, 2560, 24, 16),
    "llama_350m": (1024, 2736, 24, 16),
    "llama_1b": (2048, 5461, 24, 32),
    "llama_3b": (2560, 6848, 32, 32),
    "llama_7b": (4096, 11008, 32, 32),
}


@pytest.mark.parametrize("name", LLAMA)
def test_sizes_of_a_llama(name: str) -> None:
    hidden, mlp, layers, heads = LLAMA[name]
    config = preset_config(name)
    assert isinstance(config, LlamaConfig)
    assert config.num_attention_heads == heads
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = 2 * 32_000 * hidden + layers * (4 * hidden**2 + 3 * hidden * mlp + 2 * hidden) + hidden
    assert sum(p.numel() for p in model.parameters()) == expected


def test_every_preset_has_a_test() -> None:
    assert set(PRESETS) == {*LLAMA, "llama_bench", "gpt2-124m", "gpt2_bench"}


def test_most_of_llama_bench_is_projected() -> None:
    model = build_model("llama_bench")
    rows = GaLore(model, rank=64).rows()
    projected = sum(torch.Size(row.shape).numel() for row in rows if row.rank is not None)
    assert projected >= 0.7 * model.num_parameters()
    assert model.config.vocab_size == 4096


def test_gpt2_has_its_size() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config("gpt2-124m"))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 124


def test_the_weights_depend_on_the_seed_alone() -> None:
    first = build_model("llama_9m", vocab_size=300, seed=3)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    second = build_model("llama_9m", vocab_size=300, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    third = build_model("llama_9m", vocab_size=300, seed=4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


def test_bfloat16_keeps_the_rotary_frequencies_in_float32() -> None:
    model = build_model("llama_9m", vocab_size=300, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_config_file_or_folder(tmp_path: Path) -> None:
    write_model(tmp_path).rename(tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json"):
        model = build_model(str(path), vocab_size=280, seq_len=64)
        assert model.config.vocab_size == 280
        assert model.config.hidden_size == 32


def test_a_checkpoint_keeps_its_weights(tmp_path: Path) -> None:
    saved = build_model(str(write_model(tmp_path)), seed=7, seq_len=64)
    saved.save_pretrained(tmp_path / "checkpoint")
    loaded = build_model(str(tmp_path / "checkpoint"), vocab_size=200, seed=8, seq_len=64)
    assert loaded.config.vocab_size == 300
    assert loaded.training
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="knows 300 tokens and the tokenizer has 301"):
        build_model(str(tmp_path / "checkpoint"), vocab_size=301)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path).rename(tmp_path / "config.json")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        build_model(str(tmp_path))


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(ValueError, match=r"'llama_benc'. Did you mean llama_bench.*llama_7b.*gpt2-124m"):
        build_model("llama_benc")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "missing.json", "a/b/c"])
def test_a_missing_path(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        build_model(name)


def test_a_name_on_the_hub_is_looked_up_there() -> None:
    # Off-line, the look-up ends in an error that names what was looked for.
    with pytest.raises(ValueError, match=r"'nobody/nothing' cannot be loaded"):
        build_model("nobody/nothing")


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        build_model(str(tmp_path))


def test_a_config_that_is_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"'vit'.*no causal language model"):
        build_model(str(tmp_path))


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not a config"):
        build_model(str(tmp_path))


def test_sequences_longer_than_the_context(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seq_len 65 is longer than the 64 positions"):
        build_model(str(write_model(tmp_path)), seq_len=65)
    assert preset_config("llama_9m", seq_len=5000).max_position_embeddings == 5000


def test_where_a_model_has_its_tokenizer(tmp_path: Path) -> None:
    assert model_tokenizer("llama_bench") is None
    assert model_tokenizer(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model_tokenizer(str(tmp_path)) == str(tmp_path)
    assert model_tokenizer("owner/name") == "owner/name"
