"""A small Llama from scratch, or an existing model trained on. Written as a Hugging Face folder, tokenizer included."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.loader import DTYPES
from training.errors import TrainError
from training.recipe import Losses, TrainContext, Windows

LOSS_TOKENS = 2048  # tokens whose logits exist at one time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class LMOptions:
    """The defaults are those of the demo's target."""

    init: str = ""  # model folder to train on; the sizes are then its own
    layers: int = 8  # number of layers
    hidden: int = 256  # size of the hidden states
    heads: int = 4  # of the attention
    kv_heads: int = 2  # key and value heads
    mlp: int = 704  # width of the MLP
    context: int = 1024  # the longest text that the model is for
    dtype: str = "bfloat16"  # of the written weights
    compile: bool = False  # torch.compile; pays on long runs

    def __post_init__(self) -> None:
        """Raise TrainError for values that cannot work."""
        for name in ("layers", "hidden", "heads", "kv_heads", "mlp", "context"):
            if getattr(self, name) < 1:
                raise TrainError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise TrainError("--hidden must be a multiple of --heads, and --heads of --kv-heads")
        if self.dtype not in DTYPES:
            raise TrainError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")


class LMRecipe:
    """Next-token cross-entropy."""

    def __init__(self, options: LMOptions, context: TrainContext, module: Any) -> None:
        self.module: nn.Module = module
        self._options = options
        self._tokenizer_folder = context.tokenizer_folder
        if context.checkpointing:
            module.gradient_checkpointing_enable()
        self._trunk = torch.compile(module.model) if options.compile else module.model
        self._loss = torch.compile(_cross_entropy) if options.compile else _cross_entropy

    def loss(self, windows: Windows) -> Losses:
        hidden = self._trunk(input_ids=windows.tokens[:, :-1], use_cache=False).last_hidden_state
        labels = windows.tokens[:, 1:].masked_fill(~windows.counts[:, 1:], -100)
        weight: Tensor = self.module.get_parameter("lm_head.weight")
        portions = zip(
            torch.split(hidden.flatten(0, 1), LOSS_TOKENS), torch.split(labels.flatten(), LOSS_TOKENS), strict=True
        )
        sums = [checkpoint(self._loss, h, weight, y, use_reentrant=False) for h, y in portions]
        loss = torch.stack(sums).sum() / windows.counts[:, 1:].sum().clamp(min=1)
        return Losses(loss, {})

    def save(self, folder: Path) -> None:
        save_model(self.module, folder, self._options.dtype, self._tokenizer_folder)


def build_lm(options: LMOptions, context: TrainContext) -> LMRecipe:
    """A new model, or the one in ``options.init``.

    Raises:
        TrainError: sizes that do not fit, a window longer than the context, an unreadable model.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(context.seed)
    if options.init:
        try:
            module = AutoModelForCausalLM.from_pretrained(options.init, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TrainError(f"--init {options.init} cannot be loaded: {str(error).splitlines()[0]}") from error
        if module.config.vocab_size < context.tokenizer.vocab_size:
            raise TrainError(
                f"--init {options.init} has {module.config.vocab_size} tokens and the tokenizer "
                f"{context.tokenizer.vocab_size}; use its own tokenizer"
            )
    else:
        end = context.tokenizer.eos_token_id
        module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=context.tokenizer.vocab_size,
                hidden_size=options.hidden,
                intermediate_size=options.mlp,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                num_key_value_heads=options.kv_heads,
                head_dim=options.hidden // options.heads,
                max_position_embeddings=options.context,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                bos_token_id=end,
                eos_token_id=end,
            )
        )
    if context.window > module.config.max_position_embeddings:
        raise TrainError(
            f"--window {context.window} is longer than the model's context of "
            f"{module.config.max_position_embeddings}; lower --window"
            + ("" if options.init else ", or raise --context")
        )
    return LMRecipe(options, context, module)


def save_model(module: Any, folder: Path, dtype: str, tokenizer_folder: Path) -> None:
    """A model folder as transformers and vLLM read it."""
    converted: dict[int, Tensor] = {}  # by the address of what they were: tied weights stay tied, and are stored once
    state = module.state_dict()
    for tensor in state.values():
        converted.setdefault(tensor.data_ptr(), tensor.to(getattr(torch, dtype)))
    module.save_pretrained(folder, state_dict={name: converted[tensor.data_ptr()] for name, tensor in state.items()})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = dtype  # transformers writes that of the module, which trains in float32
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=-100, reduction="sum")
