"""`pixellm init`: how a real training run starts (paper Sec. 5.1).

Takes a Llama, plain or out of a LLaVA-1.5, and a CLIP tower; adds the codebook tokens to the tokenizer, lengthens the
embeddings by rows from N(0, 0.02), and draws projectors, codebook, neck and decoder from a seed. Streams like the
converter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from pixellm.errors import ConfigError, ModelLoadError
from pixellm.model.assemble import (
    AssemblyReport,
    ModelFolderWriter,
    copy_file,
    load_tokenizer,
    new_folder,
    read_config,
    read_vision_config,
    resolve_folder,
    weight_shapes,
)
from pixellm.model.config import PixelLMConfig
from pixellm.model.networks import meta_network
from pixellm.model.official import is_weight, list_problems, vision_name
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.tokenization import add_codebook_tokens
from pixellm.model.weight_files import Shapes, WeightFiles

EMBEDDING_STD = 0.02
_NEW_PARTS = ("image_projector", "decoder_projector", "neck", "codebook", "decoder")
_ROWS = ("language_model.embed_tokens.weight", "lm_head.weight")
_LANGUAGE = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|model\.)(?P<rest>embed_tokens|layers|norm)\."
)
_HEAD = re.compile(r"(?:language_model\.)?lm_head\.weight$")
_PROJECTOR = re.compile(
    r"(?:model\.)?(?:mm_projector\.(?P<index>[02])|multi_modal_projector\.linear_(?P<number>[12]))\.(?P<kind>weight|bias)$"
)
_LEFT_OUT = re.compile(r"(?:model\.)?(?:vision_tower|image_newline)\b")


@dataclass(frozen=True)
class ExtraParts:
    """Weights of a further model that a baseline is put together from.

    Attributes:
        source: its files.
        names: our name by its key; other keys are left out.
        config_class: of the baseline.
    """

    source: WeightFiles
    names: dict[str, str]
    config_class: type[PixelLMConfig]

    @property
    def shapes(self) -> Shapes:
        """By our name."""
        return {self.names[key]: shape for key, shape in self.source.shapes().items() if key in self.names}


def init_model(
    llm: str | PathLike[str],
    vision: str | PathLike[str],
    out: str | PathLike[str],
    *,
    tokens_per_scale: int = 3,
    num_scales: int = 2,
    image_size: int = 448,
    seed: int = 0,
    projector: str = "new",
    dtype: torch.dtype | None = None,
    extra: ExtraParts | None = None,
    **overrides: Any,
) -> AssemblyReport:
    """Makes a model folder to train from.

    Args:
        llm: folder or Hugging Face id of a Llama or LLaVA-1.5, with its tokenizer.
        vision: folder or id of a CLIP tower (a whole CLIP will do).
        out: folder to make.
        tokens_per_scale: N.
        num_scales: L.
        image_size: side of the canvas in pixels.
        seed: of all that is drawn.
        projector: `"new"` draws the vision-to-language projector; `"llava"` takes LLaVA's own.
        dtype: to store weights in; None keeps the towers' and gives new parts the language model's.
        extra: a baseline's further part, see `baselines.lisa_init`.
        **overrides: fields of the configuration.

    Raises:
        ModelLoadError: a source that lacks weights or files, or holds unknown ones.
        ConfigError: `out` exists, or options that do not fit together.
    """
    llm_folder, vision_folder = resolve_folder(llm), resolve_folder(vision)
    source, tower = WeightFiles.find(llm_folder), WeightFiles.find(vision_folder)
    shapes = {key: shape for key, shape in source.shapes().items() if is_weight(key)}
    names = language_names(shapes, with_projector=projector == "llava")
    tokenizer = load_tokenizer(llm_folder)
    if tokenizer is None:
        raise ModelLoadError(f"{llm_folder} has no tokenizer (tokenizer.json or tokenizer.model); copy it there")
    ids = add_codebook_tokens(tokenizer, tokens_per_scale, num_scales)
    vision_names = {key: name for key in tower.shapes() if (name := vision_name(key)) is not None}
    vision_shapes = {key: shape for key, shape in tower.shapes().items() if key in vision_names}
    fields: dict[str, Any] = {
        "text_config": _text_fields(read_config(llm_folder), shapes, names, ids.vocab_size, tokenizer.pad_token_id),
        "vision_config": read_vision_config(vision_folder, vision_shapes),
        "tokens_per_scale": tokens_per_scale,
        "num_scales": num_scales,
        "image_size": image_size,
        "codebook_token_ids": list(ids.codebook),
        "im_start_id": ids.im_start,
        "im_end_id": ids.im_end,
    }
    config_class = PixelLMConfig if extra is None else extra.config_class
    config = config_class(**(_derived_fields(fields, shapes, names, projector) | overrides))
    wanted = weight_shapes(config)
    others = {vision_names[key]: shape for key, shape in vision_shapes.items()}
    _check_sources(shapes, names, others | ({} if extra is None else extra.shapes), wanted)
    generator = torch.Generator().manual_seed(seed)
    with new_folder(out) as folder:
        writer = ModelFolderWriter(folder, config, wanted)

        def lengthened(name: str, tensor: Tensor) -> Tensor:
            return _lengthen(tensor, wanted[name][0], generator) if name in _ROWS else tensor

        for file in source.files:
            copy_file(writer, source, file, names, dtype, lengthened)
        for file in tower.files:
            copy_file(writer, tower, file, vision_names, dtype)
        if extra is not None:
            for file in extra.source.files:
                copy_file(writer, extra.source, file, extra.names, dtype)
        new_dtype = dtype or _embedding_dtype(source, names)
        new = draw_new_parts(config, seed)
        if "lm_head.weight" not in writer.weight_map:  # tied in the source; ours are separate
            embedding = next(t for key, t in source.all_tensors() if names.get(key) == _ROWS[0])
            new["lm_head.weight"] = _lengthen(embedding, wanted["lm_head.weight"][0], generator)
        absent = wanted.keys() - writer.weight_map.keys()
        writer.add_all({name: tensor.to(new_dtype) for name, tensor in new.items() if name in absent})
        PixelLMProcessor.for_config(config, tokenizer).save_pretrained(folder)
        report = writer.finish(has_tokenizer=True)
    return replace(report, path=str(out))


def language_names(shapes: Mapping[str, tuple[int, ...]], *, with_projector: bool) -> dict[str, str]:
    """Our name by key of a Llama or LLaVA-1.5 checkpoint (either layout).

    Raises:
        ModelLoadError: keys of neither, or no projector where one is wanted.
    """
    names: dict[str, str] = {}
    unknown = []
    for key in shapes:
        if match := _LANGUAGE.match(key):
            names[key] = "language_model." + key[match.start("rest") :]
        elif _HEAD.match(key):
            names[key] = "lm_head.weight"
        elif match := _PROJECTOR.match(key):
            index = match["index"] or str(2 * (int(match["number"]) - 1))
            if with_projector:
                names[key] = f"image_projector.layers.{index}.{match['kind']}"
        elif not _LEFT_OUT.match(key):
            unknown.append(key)
    if unknown:
        raise ModelLoadError(f"{len(unknown)} keys are neither Llama's nor LLaVA-1.5's: {', '.join(sorted(unknown))}")
    if with_projector and not any(name.startswith("image_projector") for name in names.values()):
        raise ModelLoadError("projector='llava' needs a LLaVA-1.5 checkpoint, and this one has no projector; use 'new'")
    return names


def draw_new_parts(config: PixelLMConfig, seed: int) -> dict[str, Tensor]:
    """Draws the parts that no source has, the same for the same seed, without building the towers.

    Args:
        config: of the model.
        seed: of torch's generator, which is left as it was.

    Returns:
        fp32 weights by name.
    """
    model = meta_network(config)
    weights: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in (part for part in _NEW_PARTS if hasattr(model, part)):
            module = model.get_submodule(part).to_empty(device="cpu")
            for child in module.modules():
                child._is_hf_initialized = False
                model._init_weights(child)
            weights |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    return weights


def _text_fields(
    source: Mapping[str, Any], shapes: Shapes, names: Mapping[str, str], vocab_size: int, pad_token_id: int | None
) -> dict[str, Any]:
    """The language model's configuration with its vocabulary lengthened."""
    fields = dict(source.get("text_config") or source)
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    rows = next((shape[0] for key, shape in shapes.items() if names.get(key) == _ROWS[0]), 0)
    kept = {key: value for key, value in fields.items() if key in known and key not in ("architectures", "dtype")}
    lengthened = {"vocab_size": max(rows, vocab_size), "pad_token_id": pad_token_id or 0, "tie_word_embeddings": False}
    return LlamaConfig(**(kept | lengthened)).to_dict()


def _derived_fields(fields: dict[str, Any], shapes: Shapes, names: Mapping[str, str], projector: str) -> dict[str, Any]:
    """Adds what follows from the sources: feature layers, grid of image tokens, projector width."""
    if projector not in ("new", "llava"):
        raise ConfigError(f"projector is {projector!r}; choose 'new' or 'llava'")
    vision = fields["vision_config"]
    depth = int(vision["num_hidden_layers"])
    layers = [-2 - round(depth * share) for share in (0.0, 0.375, 0.667)]
    fields["vision_feature_layers"] = layers[: fields["num_scales"]]
    fields["image_token_grid"] = max(1, fields["image_size"] // int(vision["patch_size"]) // 2)
    if projector == "llava":
        widths = [shapes[key][0] for key, name in names.items() if name == "image_projector.layers.0.weight"]
        fields["projector_hidden_size"] = widths[0]
    return fields


def _check_sources(shapes: Shapes, names: Mapping[str, str], vision_shapes: Shapes, wanted: Shapes) -> None:
    """Compares what the sources hold with what the model needs; rows of the vocabulary may be fewer."""
    found = vision_shapes | {names[key]: shape for key, shape in shapes.items() if key in names}
    for name in _ROWS:
        if name in found and found[name][1:] == wanted[name][1:]:
            found[name] = wanted[name]
    found.setdefault("lm_head.weight", wanted["lm_head.weight"])
    drawn = {name: shape for name, shape in wanted.items() if name.startswith(_NEW_PARTS) and name not in found}
    if problems := list_problems(found, {name: shape for name, shape in wanted.items() if name not in drawn}):
        raise ModelLoadError("the sources do not make a model; weights " + "; ".join(problems))


def _lengthen(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Appends rows from N(0, 0.02) up to `count`."""
    new = torch.randn(count - len(rows), rows.shape[1], generator=generator) * EMBEDDING_STD
    return torch.cat([rows, new.to(rows.dtype)])


def _embedding_dtype(source: WeightFiles, names: Mapping[str, str]) -> torch.dtype:
    for file in source.files:
        for key, dtype in source.dtypes_in(file).items():
            if names.get(key) == _ROWS[0]:
                return dtype
    raise ModelLoadError(f"{source.folder} holds no token embedding; wanted a whole Llama or LLaVA-1.5 checkpoint")
