"""The one typed configuration tree: a YAML recipe, dotted overrides on top, every unknown key an error.

`load_settings("recipes/tiny.yaml", ["train.lr=1e-4"])` reads the recipe, lays the overrides over it, and validates the
whole. This is also the only module that reads environment variables (`from_environment`).
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import pixellm
from pixellm.errors import ConfigError

_MAX_EXTENDS = 8


class _Section(BaseModel):
    """A frozen part of the tree that accepts no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ModelSettings(_Section):
    """Which network is trained: a preset with overrides of `PixelLMConfig` fields, or an existing model folder."""

    preset: str = "tiny"
    overrides: dict[str, Any] = Field(default_factory=dict)
    init_from: str | None = Field(None, description="model folder or models:/ reference to start from")


QuestionGroup = Literal["segmentation", "semantic", "referring", "vqa", "muse"]


class SourceSettings(_Section):
    """One source of the mixture: shards, the kind of question composed from them, and its weight."""

    uri: str
    group: QuestionGroup
    weight: float = Field(1.0, gt=0, description="its share; with data.group_weights, within its group")
    max_samples: int | None = Field(None, ge=1, description="how many of its pictures are used, a seeded choice")
    max_targets: int | None = Field(None, ge=1, description="targets of one question; None: data.max_targets")


class DataSettings(_Section):
    """What is streamed into the workers."""

    sources: tuple[SourceSettings, ...] = ()
    group_weights: dict[QuestionGroup, float] = Field(
        default_factory=dict, description="share of each group of questions; empty: the sources' weights alone count"
    )
    replacement: bool = Field(False, description="draw samples with replacement instead of once per epoch")
    epochs: float | None = Field(
        None, gt=0, description="in the place of train.steps: until every source was gone through this often"
    )
    length_window: int = Field(
        0, ge=0, description="global batches within which texts of like length share a micro-batch; 0: as they come"
    )
    mask_size: int = Field(112, ge=8, description="side of the square canvas that training masks live on, in pixels")
    max_targets: int = Field(3, ge=1, description="targets of one composed question, at most")
    max_questions: int = Field(1, ge=1, description="question turns composed for one sample, at most")
    min_questions: int = Field(
        1, ge=1, description="question turns composed for one sample, at least, where the picture gives so many"
    )
    min_target_share: float = Field(0.0, ge=0, lt=1, description="targets below this share of the picture are left out")
    negative_share: float = Field(0.0, ge=0, lt=1, description="composed questions for what a picture lacks")
    text_variation: float = Field(0.0, ge=0, le=1, description="how likely a question's wording is changed a little")
    block_size: int = Field(64, ge=1, description="samples one reading task prepares")
    max_tasks: int | None = Field(None, ge=1, description="reading tasks of one rank at a time; None: as Ray sees fit")
    task_cpus: float = Field(0.5, gt=0, description="logical CPUs of one reading task")

    @model_validator(mode="after")
    def _questions_are_ordered(self) -> "DataSettings":
        if self.min_questions > self.max_questions:
            raise ValueError(f"min_questions {self.min_questions} is above max_questions {self.max_questions}")
        return self


class LoraSettings(_Section):
    """Low-rank adaptation of the language model (peft). Off when `enabled` is false."""

    enabled: bool = False
    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


class ValidationSettings(_Section):
    """Held-out questions asked while training goes on, with the true answers given. Off where `every` is None."""

    every: int | None = Field(None, ge=1, description="optimiser steps between validations")
    uri: str | None = Field(None, description="held-out shards; None: `evaluate.uri`")
    suite: Literal["segmentation", "muse"] = Field("muse", description="kind of questions asked of `uri`")
    limit: int = Field(64, ge=1, description="questions at most")
    num_pictures: int = Field(4, ge=0, description="answers drawn")
    metric: Literal["giou", "ciou", "text_loss"] = Field("giou", description="by which checkpoints are compared")
    keep_best: int = Field(0, ge=0, description="best checkpoints kept beside the last ones")
    patience: int | None = Field(None, ge=1, description="validations without improvement after which training ends")
    min_improvement: float = Field(0.0, ge=0, description="a smaller change of the metric is none")
    finish_with_best: bool = Field(False, description="the finished model is the best checkpoint, not the last one")


PARTS = ("vision", "projectors", "language", "lora", "embeddings", "codebook", "decoder", "neck")


class TrainSettings(_Section):
    """The training job. Defaults are the released hyper-parameters where the recipe says nothing."""

    output_dir: str = Field(
        "runs", description="folder of the runs; with workers on several machines, one that all of them mount"
    )
    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        2, description="workers, or [least, most]: goes on with fewer when a node is lost and grows back"
    )
    use_gpu: bool = False
    threads_per_worker: int = Field(1, ge=1)
    worker_cpus: float = Field(1.0, gt=0, description="logical CPUs of one worker; less where the cluster is too small")
    steps: int = Field(5000, ge=1)
    micro_batch_size: int = Field(2, ge=1, description="questions per worker and forward pass")
    grad_accumulation: int = Field(10, ge=1)
    lr: float = Field(3e-4, gt=0)
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="part → factor on `lr`, e.g. {decoder: 2.0}; parts not named have 1"
    )
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of weights; it is the finished model")
    max_skipped_steps: int = Field(3, ge=1, description="steps in a row left out as not finite before training stops")
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: int = Field(2, ge=0, le=3)
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False
    lora: LoraSettings = LoraSettings()
    train_vision: bool = Field(False, description="train the CLIP tower too (from-scratch recipes)")
    train_language: bool = Field(False, description="train all language model weights (from-scratch recipes)")
    checkpoint_every: int = Field(500, ge=1, description="optimiser steps between checkpoints")
    keep_last: int = Field(2, ge=1)
    checkpoint_uri: str | None = Field(None, description="where checkpoints are also kept (s3://, gs://, a path)")
    max_failures: int = Field(2, ge=0, description="restarts of the worker group after a fault")
    resize_check_s: float = Field(60, gt=0, description="how often an elastic group looks for room to grow")
    validation: ValidationSettings = ValidationSettings()

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The workers that the run wants."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return self.min_workers < self.max_workers

    @property
    def global_batch_size(self) -> int:
        """Questions per optimiser step over all workers, however many there are at the moment."""
        return self.max_workers * self.micro_batch_size * self.grad_accumulation

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainSettings":
        if "://" in self.output_dir:
            raise ValueError(
                f"output_dir is {self.output_dir!r}; wanted a folder, with workers on several machines one that all of "
                "them mount (checkpoint_uri keeps copies in a store)"
            )
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers is [least, most], got {list(self.num_workers)}")  # type: ignore[arg-type]
        micro_batches = self.max_workers * self.grad_accumulation
        uneven = [count for count in range(self.min_workers, self.max_workers) if micro_batches % count]
        if uneven:
            raise ValueError(
                f"the {micro_batches} micro-batches of a step cannot be shared equally by {uneven[0]} workers; raise "
                "grad_accumulation so that every number of workers in num_workers divides it, or narrow num_workers"
            )
        unknown = sorted(set(self.lr_scale) - set(PARTS))
        if unknown:
            raise ValueError(f"lr_scale names {unknown[0]!r}; parts are {', '.join(PARTS)}")
        chosen = self.validation
        if chosen.every is None and (chosen.keep_best or chosen.patience or chosen.finish_with_best):
            raise ValueError("validation.keep_best, patience and finish_with_best need validation.every")
        if chosen.finish_with_best and not chosen.keep_best:
            raise ValueError("validation.finish_with_best needs validation.keep_best of at least 1")
        return self


class EvaluateSettings(_Section):
    """The evaluation that gates promotion after training."""

    uri: str | None = Field(
        None, description="shards evaluated after training; None: training's own, before registering"
    )
    suite: Literal["segmentation", "muse"] = Field("segmentation", description="kind of questions asked of `uri`")
    mode: Literal["generated", "forced"] = Field("generated", description="answers generated, or targets given")
    limit: int | None = Field(None, ge=1, description="questions at most")
    batch_size: int = Field(8, ge=1)


class PlanSettings(_Section):
    """What `pixellm train --dry-run` reckons with."""

    device_gb: float | None = Field(
        None, gt=0, description="memory of one GPU in 10⁹ bytes; None: 80, on CPU the host's"
    )
    peak_tflops: float | None = Field(None, gt=0, description="of one device; None: 312 (A100, bf16), on CPU unknown")
    mfu: float = Field(0.35, gt=0, le=1, description="share of the peak that training reaches")
    text_tokens: int = Field(200, ge=1, description="text positions of an average sample")
    targets: int = Field(3, ge=1, description="masks of an average sample")


class TrackingSettings(_Section):
    """Where MLflow keeps runs. `uri` None: a SQLite file beside the artifacts under `root`."""

    uri: str | None = None
    root: str = "runs/mlflow"
    experiment: str = "pixellm"


class RegistrySettings(_Section):
    """How a finished model enters the registry, and what `champion` asks of it."""

    model_name: str = "pixellm"
    register_final: bool = True
    promote: bool = True
    gate_metric: str = "giou"
    gate_floor: float = Field(0.0, ge=0, le=1)
    gate_max_regression: float = Field(0.02, ge=0, description="how far below the champion's metric is still accepted")


class ServeSettings(_Section):
    """The Ray Serve application."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(4, gt=0)
    max_ongoing_requests: int = Field(16, ge=1)
    max_queued_requests: int = Field(64, ge=1)
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(120, ge=0)
    replica_gpus: float = Field(0, ge=0)
    replica_cpus: float = Field(1, ge=0)
    threads_per_replica: int = Field(1, ge=1)
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="numbers of the served weights")
    ingress_cpus: float = Field(0.5, ge=0, description="logical CPUs reserved for the HTTP ingress")
    start_timeout_s: float = Field(300, gt=0, description="how long a deployment may take until it answers")
    max_batch_size: int = Field(8, ge=1)
    max_new_tokens: int = Field(256, ge=1, description="the most a request may ask for")
    max_targets: int = Field(64, ge=1, description="targets of one answer, at most; it ends where one more would begin")
    max_body_bytes: int = Field(32 * 2**20, ge=1024)
    max_image_pixels: int = Field(50_000_000, ge=1)
    max_prompt_chars: int = Field(8000, ge=1, description="characters of a prompt with its conversation, at most")
    request_timeout_s: float = Field(60, gt=0, description="from arrival to the last byte, queueing included")
    max_retries: int = Field(2, ge=0, description="how often a request is sent again when its replica died")
    ingress_replicas: int = Field(1, ge=1)
    health_check_period_s: float = Field(5, gt=0)
    health_check_timeout_s: float = Field(15, gt=0, description="a replica that does not answer this long is ill")
    stall_timeout_s: float = Field(30, gt=0, description="an engine that has work and makes no step is stuck after it")
    watch_period_s: float = Field(10, gt=0, description="how often the registry is asked whether a served alias moved")
    drain_s: float = Field(10, ge=0, description="how long a replaced version's engines stay after the switch")
    api_keys_file: str | None = Field(None, description="hashed API keys, one a line (`pixellm key NAME` makes one)")
    max_concurrent_per_key: int | None = Field(None, ge=1, description="open requests of one key; None: no limit")
    max_per_minute_per_key: int | None = Field(None, ge=1, description="requests of one key in a minute, on average")
    image_url_hosts: tuple[str, ...] = Field((), description="hosts that pictures are fetched from; none: no URLs")
    image_url_timeout_s: float = Field(10, gt=0)
    feedback_dir: str | None = Field(None, description="where POST /v1/feedback is kept; None: not accepted")
    access_log: Literal["off", "stderr"] = Field("off", description="one JSON line per request of the API")
    log_prompts: bool = Field(False, description="prompts in the access log too; pictures never are")
    tracing: Literal["off", "console", "otlp"] = Field("off", description="OpenTelemetry spans of requests")


class ClusterSettings(_Section):
    """How this process reaches Ray. `address` None: start a local cluster that ends with the process."""

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a local cluster; None: what the machine has")


class Settings(_Section):
    """The whole tree, as a recipe gives it."""

    name: str = Field("pixellm", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0)
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    plan: PlanSettings = PlanSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    tracking: TrackingSettings = TrackingSettings()
    registry: RegistrySettings = RegistrySettings()
    serve: ServeSettings = ServeSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _replicas_are_ordered(self) -> "Settings":
        if self.serve.min_replicas > self.serve.max_replicas:
            raise ValueError("serve.min_replicas is above serve.max_replicas")
        return self

    def to_yaml(self) -> str:
        """The resolved tree as YAML, loadable by `load_settings`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, str]:
        """Every leaf as `a.b.c → text`, for a run's parameters."""
        return dict(_flatten(self.model_dump(mode="json")))


def load_settings(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Reads a recipe and lays overrides over it.

    Args:
        path: YAML file, or the name of a recipe that comes with the package: `tiny`, `tiny.yaml`, `recipes/tiny.yaml`
            (a file of that name in the working directory goes first); None means all defaults. A file may begin with
            `extends: other.yaml` and then says only what differs.
        overrides: `a.b=value` (a leading `--` is allowed); the value is read as YAML: `1e-4`, `[a, b]`, `true`.

    Returns:
        The validated, frozen tree.

    Raises:
        ConfigError: the file is absent or not a YAML mapping, a key is unknown (the nearest known key is named), or a
            value has the wrong type or range.
    """
    tree = _read_yaml(find_recipe(path)) if path is not None else {}
    where = str(path) if path is not None else "the settings"
    for override in overrides:
        _lay_over(tree, override)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def find_recipe(path: str | Path) -> Path:
    """The file that a recipe's name means: the path as given if there is such a file, else the recipe of the package.

    Returns:
        A path; it exists unless neither does, then it is the one given. A folder is no recipe: `demo` means the
        recipe beside what `pixellm demo` left, too.
    """
    given = Path(path)
    inside = given.relative_to("recipes") if given.is_relative_to("recipes") else given
    if given.is_file() or inside.is_absolute() or inside.parent not in (Path(), Path("ablations")):
        return given
    packaged = _recipe_folder() / inside.parent / f"{inside.stem}.yaml"
    return packaged if packaged.is_file() else given


def from_environment() -> dict[str, str]:
    """The environment variables that pixellm honours, those that are set.

    `MLFLOW_TRACKING_URI` and `RAY_ADDRESS` stand in for `tracking.uri` and `cluster.address` where the recipe leaves
    them empty; `RAY_API_SERVER_ADDRESS` is where `pixellm submit` goes without `--address`; `PIXELLM_LOG_LEVEL` sets
    the log level; `TORCH_EXTENSIONS_DIR` is where torch keeps what it compiles. `PIXELLM_API_KEYS` holds hashed keys of
    a service as `serve.api_keys_file` does, `PIXELLM_API_KEY` is the key that `pixellm query` sends,
    `OPENAI_API_KEY` the one for the endpoint of a language model (`--base-url`).
    """
    names = (
        "MLFLOW_TRACKING_URI",
        "OPENAI_API_KEY",
        "PIXELLM_API_KEY",
        "PIXELLM_API_KEYS",
        "PIXELLM_LOG_LEVEL",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "TORCH_EXTENSIONS_DIR",
    )
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def check_secrets() -> None:
    """Looks for the variables that a job was submitted with by name (`pixellm submit --secret NAME`).

    Raises:
        ConfigError: one is not set here.
    """
    wanted = os.environ.get("PIXELLM_SECRETS", "").split(",")
    missing = [name for name in wanted if name and not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"the job wants {', '.join(missing)}, which the cluster does not hold; set it where Ray is started (a "
            "Kubernetes Secret, the environment of `ray start`)"
        )


def is_inside_ray_job() -> bool:
    """Whether this process was started by a submitted Ray job, which has shipped the code already."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _recipe_folder() -> Path:
    return Path(pixellm.__file__).parent / "recipes"


def _read_yaml(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        shipped = ", ".join(sorted(file.stem for file in _recipe_folder().glob("*.yaml")))
        raise ConfigError(
            f"cannot read the recipe {path}: {error.strerror}; give --config an existing YAML file, or the name of a "
            f"recipe that comes with pixellm: {shipped}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; give --config a YAML file") from None
    try:
        tree = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}, wanted a mapping of sections (model:, data:, train:, …)"
        )
    # A section whose lines are all commented out reads as null.
    tree = {key: value for key, value in tree.items() if value is not None}
    if (parent := tree.pop("extends", None)) is None:
        return tree
    if len(children) > _MAX_EXTENDS:
        raise ConfigError(f"{path} extends itself, by way of {', '.join(child.name for child in children)}")
    return _merged(_read_yaml(path.parent / str(parent), (*children, path)), tree)


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged, every other value is replaced."""
    merged = dict(tree)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.removeprefix("--").partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form --section.key=value, e.g. --train.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    *sections, leaf = key.split(".")
    node: Any = tree
    for section in sections:
        node = _child(node, section, override)
    if isinstance(node, list):
        node[_index(node, leaf, override)] = value
    else:
        node[leaf] = value


def _child(node: Any, key: str, override: str) -> Any:
    """The section or list under `key`; an absent or empty section is made."""
    if isinstance(node, list):
        child = node[_index(node, key, override)]
    else:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    return child


def _index(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"override {override!r}: wanted an index below {len(items)} in the place of {key!r}")
    return int(key)


def _explain(error: ValidationError, where: str) -> str:
    return "; ".join(_explain_one(dict(problem), where) for problem in error.errors())


def _explain_one(problem: dict[str, Any], where: str) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}: {location or 'settings'}: {problem['msg']} (got {problem['input']!r})"[:500]
    known = sorted(_known_keys(Settings))
    wanted = ".".join(part for part in location.split(".") if not part.isdigit())
    siblings = [key for key in known if key.rpartition(".")[0] == wanted.rpartition(".")[0]]
    near = difflib.get_close_matches(wanted, siblings, 1, 0.5) or difflib.get_close_matches(wanted, known, 1, 0.3)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(siblings)}"
    return f"{where}: unknown key {location!r}; {hint}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in section.model_fields.items():
        keys.add(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys |= _known_keys(kind, f"{prefix}{name}.")
    return keys


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _flatten(value, f"{prefix}{key}.")
        else:
            leaves.append((prefix + key, str(value)))
    return leaves


class _RecipeLoader(yaml.SafeLoader):
    """YAML as recipes mean it: `1e-4` is a number (PyYAML follows YAML 1.1, where it is text), a key is given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is given twice; PyYAML would keep the last."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_RecipeLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
