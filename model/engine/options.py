"""How an engine runs: sizes, numbers and kernels, and loading a model folder accordingly."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pixellm.errors import ConfigError
from pixellm.model.engine.scheduler import SchedulerLimits
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.networks import load_network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
QUANTIZATIONS = ("8bit", "4bit", "int8-cpu")
_OUR_PARTS = ["image_projector", "decoder_projector", "neck", "lm_head", "codebook", "decoder"]
_KEPT_EXACT = ["vision_tower", "sam_encoder", *_OUR_PARTS]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs.

    Attributes:
        limits: what bounds a step of the scheduler.
        max_context_tokens: positions of prompt and answer together; None takes the model's own limit.
        picture_cache_bytes: bound of remembered pictures and prompt prefixes; 0 switches both off.
        reuse_prompt_prefix: remember key/value states of the prompt up to the picture too.
        max_batch_targets: most targets whose masks are decoded together; bounds memory. Eight cost the least per target
            on 2 CPU cores (`small`: 19.7 ms each, 24.8 alone or 64 together); a GPU takes more.
        dtype: "fp32", "bf16" or "fp16".
        attention: "sdpa", "eager" or "flash_attention_2" (a CUDA device and its package).
        compile_decode: compile the step of generation (torch.compile; CUDA graphs on a CUDA device).
        quantization: None; "8bit" or "4bit" (bitsandbytes, CUDA) or "int8-cpu" (dynamic) for the language model.
    """

    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_context_tokens: int | None = None
    picture_cache_bytes: int = 256 * 2**20
    reuse_prompt_prefix: bool = True
    max_batch_targets: int = 8
    dtype: str = "fp32"
    attention: str = "sdpa"
    compile_decode: bool = False
    quantization: str | None = None

    def __post_init__(self) -> None:
        """Refuses unknown names and impossible sizes.

        Raises:
            ConfigError: naming the option and its choices.
        """
        for name, value, choices in (
            ("dtype", self.dtype, tuple(DTYPES)),
            ("attention", self.attention, ATTENTIONS),
            ("quantization", self.quantization, (None, *QUANTIZATIONS)),
        ):
            if value not in choices:
                raise ConfigError(f"engine {name} is {value!r}; choose one of {', '.join(map(str, choices))}")
        if self.max_batch_targets < 1:
            raise ConfigError(f"max_batch_targets is {self.max_batch_targets}; it must be at least 1")


def load_model(path: str | Path, device: str, options: EngineOptions) -> PixelLMForConditionalGeneration:
    """Loads a model folder with the options' numbers and kernels.

    Raises:
        ModelLoadError: weights are missing, unexpected or mis-shaped.
        ConfigError: a device or an option that this machine cannot run.
    """
    kwargs: dict[str, Any] = {"dtype": DTYPES[options.dtype], "attn_implementation": _attention(options, device)}
    if options.quantization in ("8bit", "4bit"):
        kwargs |= {"quantization_config": bitsandbytes_config(options), "device_map": {"": device}}
        check_device(device)
        return load_network(path, **kwargs)
    check_device(device)
    model = load_network(path, **kwargs).to(device)  # type: ignore[arg-type]
    if options.quantization == "int8-cpu":
        quantize_language_model_int8(model)
    return model


def check_device(device: str) -> None:
    """Raises ConfigError unless tensors can be put on `device`: "cpu", "cuda", "cuda:1", …"""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name; no such device; not built in
        raise ConfigError(f"cannot run on device {device!r}: {str(error).splitlines()[0]}; cpu always can") from None


def bitsandbytes_config(options: EngineOptions) -> Any:
    """The quantization of the language model's linear layers; everything that makes masks stays as it is.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization {options.quantization!r} needs the package bitsandbytes and a CUDA device: "
            "pip install bitsandbytes, or leave quantization out"
        )
    from transformers import BitsAndBytesConfig  # optional dependency

    if options.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_KEPT_EXACT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[options.dtype],
        llm_int8_skip_modules=_KEPT_EXACT,
    )


def quantize_language_model_int8(model: PixelLMForConditionalGeneration) -> None:
    """Replaces the language model's linear layers by dynamically quantized int8 ones, in place, on the CPU.

    Raises:
        ConfigError: the model is not on the CPU in fp32.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ConfigError(
            f"quantization 'int8-cpu' needs the CPU and fp32, the model is on {model.device} in {model.dtype}; "
            "use '8bit' on CUDA"
        )
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model.language_model = quantize(model.language_model, {torch.nn.Linear}, dtype=torch.qint8)


def _attention(options: EngineOptions, device: str) -> str:
    if options.attention != "flash_attention_2":
        return options.attention
    if not device.startswith("cuda"):
        raise ConfigError(f"attention 'flash_attention_2' needs a CUDA device, got {device!r}; use 'sdpa'")
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError("attention 'flash_attention_2' needs the package flash-attn; install it, or use 'sdpa'")
    return options.attention
