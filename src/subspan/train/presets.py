"""Models by name: the presets, a Hugging Face config, a local checkpoint or a name on the hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from subspan.checkpoint.save import LOW_RANK_JSON

__all__ = ["MERGE_FIRST", "PRESETS", "GPT2Size", "LlamaSize", "build_model", "model_tokenizer", "skeleton"]

MERGE_FIRST = "make an ordinary model of it first, with subspan merge RUN_OR_CHECKPOINT MODEL_FOLDER"


class LlamaSize(NamedTuple):
    """Sizes of a LLaMA: hidden width, MLP width, layers, heads, default vocabulary."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    vocab_size: int = 32_000


class GPT2Size(NamedTuple):
    """Sizes of a GPT-2: hidden width, layers, heads, default vocabulary."""

    hidden: int
    layers: int
    heads: int
    vocab_size: int = 50_257


#: The sizes of the ReLoRA and GaLore experiments (arXiv:2307.05695, 2403.03507), and `llama_bench`, whose small
#: vocabulary leaves 75 % of the parameters in projected matrices, so that it can judge a low-rank method
#: (`llama_9m` with 32,000 tokens projects 9 %); and GPT-2, with `gpt2_bench` of the same kind.
PRESETS: dict[str, LlamaSize | GPT2Size] = {
    "llama_9m": LlamaSize(128, 352, 4, 4),
    "llama_20m": LlamaSize(256, 688, 4, 4),
    "llama_35m": LlamaSize(384, 1024, 6, 8),
    "llama_40m": LlamaSize(416, 1024, 8, 8),
    "llama_60m": LlamaSize(512, 1376, 8, 8),
    "llama_100m": LlamaSize(640, 1708, 12, 10),
    "llama_130m": LlamaSize(768, 2048, 12, 12),
    "llama_250m": LlamaSize(768, 2560, 24, 16),
    "llama_350m": LlamaSize(1024, 2736, 24, 16),
    "llama_1b": LlamaSize(2048, 5461, 24, 32),
    "llama_3b": LlamaSize(2560, 6848, 32, 32),
    "llama_7b": LlamaSize(4096, 11008, 32, 32),
    "llama_bench": LlamaSize(256, 688, 8, 4, vocab_size=4096),
    "gpt2-124m": GPT2Size(768, 12, 12),
    "gpt2_bench": GPT2Size(256, 8, 4, vocab_size=4096),
}


def preset_config(name: str, *, vocab_size: int | None = None, seq_len: int = 128) -> PretrainedConfig:
    """Return the Hugging Face config of a preset; embedding and output head are untied for every LLaMA.

    Args:
        name: a key of `PRESETS`.
        vocab_size: tokens in the vocabulary (default: the preset's).
        seq_len: longest sequence that will be trained on, in tokens.
    """
    size = PRESETS[name]
    if isinstance(size, GPT2Size):
        return GPT2Config(
            vocab_size=vocab_size or size.vocab_size,
            n_embd=size.hidden,
            n_layer=size.layers,
            n_head=size.heads,
            n_positions=max(1024, seq_len),
            bos_token_id=None,
            eos_token_id=None,
        )
    return LlamaConfig(
        vocab_size=vocab_size or size.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=max(1024, seq_len),
        tie_word_embeddings=False,
    )


def build_model(
    name_or_path: str,
    *,
    vocab_size: int | None = None,
    seq_len: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Build a causal language model from a preset, a config, a local checkpoint or a name on the hub.

    A preset or a config gives freshly initialised weights that depend on `seed` alone; a checkpoint gives its own.
    Weights are read from safetensors only and no code that comes with a model is ever run.

    Args:
        name_or_path: a key of `PRESETS`; a ``config.json`` or a folder that holds one; a checkpoint folder with
            ``*.safetensors`` beside the config; or ``owner/name`` on the Hugging Face hub.
        vocab_size: tokens in the vocabulary. It replaces the one of a preset or config; a checkpoint keeps its own,
            which must be at least as large.
        seq_len: longest sequence that will be trained on, in tokens.
        seed: of the initial weights.
        dtype: of the weights.

    Returns:
        The model, in training mode, on the CPU.

    Raises:
        ValueError: unknown name, or a vocabulary or context too small for what is asked.
        FileNotFoundError: the path does not exist or holds no config.

    Example:
        >>> model = build_model("llama_9m", vocab_size=512, seq_len=64)
        >>> model.config.hidden_size, model.config.vocab_size
        (128, 512)
    """
    if name_or_path in PRESETS:
        return _initialise(preset_config(name_or_path, vocab_size=vocab_size, seq_len=seq_len), seed, dtype)

    path = Path(name_or_path).expanduser()
    if path.is_file():
        return _initialise(_config_with(_read_config(path), vocab_size, name_or_path), seed, dtype, seq_len)
    if path.is_dir():
        config = _read_config(path)
        if any(path.glob("shard-*.safetensors")):
            raise ValueError(
                f"{str(path)!r} holds the parts that several processes wrote; make a model of them first: "
                f"subspan checkpoint convert {path} MODEL_FOLDER."
            )
        if (path / LOW_RANK_JSON).is_file():
            raise ValueError(f"{str(path)!r} holds a model with weights of low rank or adapters: {MERGE_FIRST}.")
        if not any(path.glob("*.safetensors")):
            if weights := [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]:
                raise ValueError(
                    f"{weights[0]} is a pickle; only *.safetensors weights are loaded. Convert the checkpoint "
                    "(model.save_pretrained writes safetensors), or keep only its config.json to start afresh."
                )
            return _initialise(_config_with(config, vocab_size, name_or_path), seed, dtype, seq_len)
        return _load(str(path), vocab_size, seq_len, dtype)
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "~", "/")) or name_or_path.endswith(".json"):
        raise _unknown(name_or_path)
    return _load(name_or_path, vocab_size, seq_len, dtype)


def skeleton(
    name_or_path: str, *, vocab_size: int | None = None, seq_len: int = 128, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build the model that `build_model` would, from its config alone: weights are not read, also not those of a hub.

    Call it inside `subspan.memory.simulated`, or under ``torch.device("meta")``, so that they are not made either.

    Args:
        name_or_path: see `build_model`.
        vocab_size: see `build_model`; it replaces that of a checkpoint too.
        seq_len: longest sequence, in tokens.
        dtype: of the weights.

    Example:
        >>> with torch.device("meta"):
        ...     model = skeleton("llama_7b")
        >>> model.num_parameters()
        6738415616
    """
    if name_or_path in PRESETS:
        return _initialise(preset_config(name_or_path, vocab_size=vocab_size, seq_len=seq_len), 0, dtype)
    path = Path(name_or_path).expanduser()
    if path.exists():
        config = _read_config(path)
    elif name_or_path.count("/") != 1 or name_or_path.startswith((".", "~", "/")) or name_or_path.endswith(".json"):
        raise _unknown(name_or_path)
    else:
        try:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the config of model {name_or_path!r} cannot be loaded: {error}\n"
                f"Presets that need no download: {', '.join(PRESETS)}."
            ) from error
    return _initialise(_config_with(config, vocab_size, name_or_path), 0, dtype, seq_len)


def model_tokenizer(name_or_path: str) -> str | None:
    """Return where the tokenizer of a pretrained model is, or None when the model brings none (preset, bare config).

    Example:
        >>> model_tokenizer("llama_bench") is None
        True
    """
    if name_or_path in PRESETS:
        return None
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return str(path) if (path / "tokenizer.json").is_file() else None
    return None if path.is_file() or name_or_path.count("/") != 1 else name_or_path


def _unknown(name: str) -> Exception:
    if "/" in name or name.startswith(("~", ".")) or name.endswith(".json"):
        return FileNotFoundError(
            f"model {name!r}: no such file or folder. Give a config.json, a checkpoint folder, owner/name on the "
            f"hub, or a preset: {', '.join(PRESETS)}."
        )
    close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return ValueError(
        f"unknown model {name!r}.{hint} Presets: {', '.join(PRESETS)}; or give a config.json, a checkpoint folder, "
        "or owner/name on the Hugging Face hub."
    )


def _read_config(path: Path) -> PretrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no config.json; a model folder needs one.")
    try:
        return AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is not a config that transformers can read: {error}") from error


def _config_with(config: PretrainedConfig, vocab_size: int | None, name: str) -> PretrainedConfig:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"model {name!r} has model_type {config.model_type!r}, which is no causal language model in transformers."
        )
    if vocab_size is not None:
        config.vocab_size = vocab_size
    return config


def _initialise(config: PretrainedConfig, seed: int, dtype: torch.dtype, seq_len: int | None = None) -> PreTrainedModel:
    if seq_len is not None:
        _check_context(config, seq_len)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, token, None)
        if isinstance(value, int) and value >= config.vocab_size:
            # GPT-2's config names token 50256, which a smaller vocabulary does not have.
            setattr(config, token, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.train()


def _load(name: str, vocab_size: int | None, seq_len: int, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"model {name!r} cannot be loaded: {error}\nPresets that need no download: {', '.join(PRESETS)}."
        ) from error
    if vocab_size is not None and vocab_size > model.config.vocab_size:
        raise ValueError(
            f"model {name!r} knows {model.config.vocab_size} tokens and the tokenizer has {vocab_size}; "
            "use the model's own tokenizer, or one that is not larger."
        )
    _check_context(model.config, seq_len)
    return model.train()


def _check_context(config: PretrainedConfig, seq_len: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise ValueError(f"seq_len {seq_len} is longer than the {longest} positions of the model; lower seq_len.")
