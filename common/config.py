"""The configuration of a run and of a node: every key typed, described, bounded; unknown keys refused.

Run-config comes from ``[tool.flwr.app.config]`` in ``pyproject.toml``, changed by ``flwr run --run-config``;
node-config from ``flower-supernode --node-config``, or from Flower's simulation. Flower hands over flat
dictionaries with dotted kebab-case keys, which is how the errors name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting that cannot be used; its text names the key, the value and what is allowed."""


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _split_names(value: object) -> object:
    """Flower's run-config has no lists, so lists are written as comma-separated strings."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=_kebab, populate_by_name=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _read_lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        listed = {
            alias
            for name, field in cls.model_fields.items()
            if str(field.annotation).startswith("tuple")
            for alias in (name, _kebab(name))
        }
        return {key: _split_names(value) if key in listed else value for key, value in values.items()}


_AnySection = TypeVar("_AnySection", bound=_Section)


class DataConfig(_Section):
    """Which data the run learns, and how a simulation divides it among clients."""

    dataset: str = Field(
        "digits",
        min_length=1,
        description="`digits`, a file or folder of parquet, CSV or JSON lines, a folder of images, or a hub id",
    )
    subset: str = Field("", description="which configuration of a hub dataset that has several")
    image_column: str = Field("image", min_length=1, description="column of images")
    text_column: str = Field("text", min_length=1, description="column of texts, read by text models")
    label_column: str = Field("label", min_length=1, description="column of class labels")
    classes: tuple[str, ...] = Field(
        (),
        description="class names, in order; or a text file with one a line; or `clients`: all that any client holds; "
        "empty: those of the dataset, which the server then must have",
    )
    image_size: int = Field(32, ge=8, le=1024, description="pixels a side at which task models see images")
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="part held out for testing where the data has no test split of its own"
    )
    partitioner: Literal["iid", "dirichlet", "pathological"] = Field(
        "dirichlet", description="how a simulation divides the training data (flwr-datasets)"
    )
    alpha: float = Field(0.1, gt=0, le=1e6, description="Dirichlet concentration; small is very non-IID")
    classes_per_client: int = Field(3, ge=1, description="classes a client holds under `pathological`")
    min_examples: int = Field(10, ge=1, description="fewest examples a partition may have")

    def key(self, field: str) -> str:
        """Name the key that a field comes from, as errors do."""
        return f"run-config key 'data.{_kebab(field)}'"


class OwnDataConfig(DataConfig):
    """A node's own data: what its node-config says, in place of the run-config."""

    own_fields: frozenset[str] = frozenset()

    def key(self, field: str) -> str:
        """Name the key that a field comes from, as errors do."""
        own = "data-path" if field == "dataset" else _kebab(field)
        return f"node-config key {own!r}" if field in self.own_fields else super().key(field)


class ClientConfig(_Section):
    """How clients learn."""

    models: tuple[str, ...] = Field(
        ("cnn", "mlp", "vit", "resnet", "text", "dual"),
        min_length=1,
        description="task models by name, `transformers:` folder or hub id, or `module:function`, given to simulated "
        "clients in turn; a node's own `model` overrides it",
    )
    warmup_epochs: int = Field(8, ge=0, le=1000, description="private epochs in a client's first round")
    local_epochs: int = Field(2, ge=0, le=1000, description="private epochs in each later round")
    batch_size: int = Field(16, ge=1, le=4096, description="private samples a step")
    synthetic_batch_size: int = Field(32, ge=1, le=4096, description="synthetic samples a step")
    distillation_steps: int = Field(
        150, ge=0, le=100_000, description="steps a round with synthetic samples, whatever the private epochs"
    )
    learning_rate: float = Field(1e-3, gt=0, le=10, description="AdamW's learning rate")
    pretrained_learning_rate: float = Field(
        5e-5, gt=0, le=10, description="the same for encoders that were trained before"
    )
    trainable: Literal["all", "head"] = Field(
        "all", description="what of a task model learns: all of it, or its head on frozen encoders"
    )
    balanced_softmax: bool = Field(True, description="add the log class prior to private logits (arXiv 2007.10740)")
    augmentation: bool = Field(True, description="random shift, scale, rotation and contrast of training images")
    distillation_weight: Weight = Field(1.0, description="weight of the KL divergence to the soft targets")
    temperature: float = Field(2.0, gt=0, le=100, description="temperature of that KL divergence")
    prompt_weight: Weight = Field(0.5, description="weight of cross entropy on the prompted class")
    alignment_weight: Weight = Field(
        0.1, description="weight of the contrastive alignment of features with the prompts' text embeddings"
    )
    pool_rounds: int = Field(3, ge=1, le=100, description="rounds of synthetic batches a client keeps")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of a client process")
    state_dir: str = Field(
        "", description="where clients keep their models; empty: ~/.fedmmkt/clients, in simulation with the run"
    )


class T2IConfig(_Section):
    """The server's text-to-image model, how it generates and how it is adapted."""

    model: str = Field("starter", min_length=1, description="`starter`, a diffusers folder, or a hub id")
    adapter: str = Field(
        "", description="folder of an adapter to begin with, such as `lora` of an earlier run; empty: a new one"
    )
    prompts: str = Field("templates", min_length=1, description="`templates`, or a JSONL file of prompts")
    prompt_templates: tuple[str, ...] = Field(
        ("the digit {}", "the number {}", "a picture of the digit {}", "an image of a {}"),
        min_length=1,
        description="templates with `{}` in place of the class name",
    )
    samples_per_round: int = Field(400, ge=1, le=1_000_000, description="images generated a round")
    generation_batch_size: int = Field(
        0, ge=0, le=4096, description="images generated at once; 0: as suits their size, at most 100"
    )
    inference_steps: int = Field(12, ge=1, le=1000, description="denoising steps")
    guidance: tuple[float, ...] = Field(
        (1.5, 1.0), min_length=1, description="guidance scale by round; the last one stays"
    )
    explore: Fraction = Field(
        0.5, description="part of the samples that vary well-scored ones of the last round (image to image)"
    )
    explore_strength: float = Field(0.5, gt=0, le=1, description="how far these are noised before denoising")
    evaluation_samples: int = Field(
        200, ge=1, le=100_000, description="images of fixed prompts and seeds by which the T2I is measured"
    )
    evaluation_guidance: float = Field(1.25, ge=0, le=100, description="guidance scale of these images")
    device: tuple[str, ...] = Field(
        ("auto",),
        min_length=1,
        description="`auto`: all GPUs, or the CPU; `cpu`, `cuda`, `cuda:1`, `mps`, or several, which generate together",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of frozen weights; `auto`: full on a CPU and for the starter, half on a GPU"
    )
    offload: Literal["auto", "none", "model"] = Field(
        "auto",
        description="`model`: keep parts that are not computing in main memory (accelerate); `auto`: where the whole "
        "would fill a GPU",
    )
    gradient_checkpointing: bool = Field(False, description="compute activations again in updates, to save memory")
    attention_slicing: bool = Field(False, description="compute attention in parts, to save memory")
    vae_tiling: bool = Field(False, description="decode large images in tiles, to save memory")
    aggregation: str = Field("mask", description="rule that turns clients' logits into soft targets")
    scores: str = Field("votes", description="rule that weights samples for the T2I: votes, consensus, none")
    agreement: Literal["cross-modal", "confidence"] = Field(
        "cross-modal",
        description="what the image of a prompt without a class must show: what text clients read in the prompt, "
        "or any class that image clients are sure of",
    )
    update: str = Field("supervised", description="loss of the LoRA update: supervised, reward, negative-aware")
    lora_rank: int = Field(8, ge=1, le=1024, description="LoRA rank")
    lora_alpha: float = Field(8, gt=0, le=4096, description="LoRA alpha")
    lora_targets: tuple[str, ...] = Field(
        ("attention", "convolution", "feed-forward", "time"),
        min_length=1,
        description="groups of layers with LoRA: attention, convolution, feed-forward, time; or layer names",
    )
    adaptation_steps: int = Field(80, ge=0, le=1_000_000, description="optimiser steps of an update")
    adaptation_batch_size: int = Field(32, ge=1, le=4096, description="samples a step")
    adaptation_micro_batch_size: int = Field(
        0, ge=0, le=4096, description="samples of a step computed at once, to save memory; 0: as suits their size"
    )
    adaptation_learning_rate: float = Field(
        3e-3, gt=0, le=10, description="AdamW's learning rate at the start of an update; it declines to zero"
    )
    caption_dropout: Fraction = Field(0.1, description="part of captions left empty in an update")
    pool_rounds: int = Field(3, ge=1, le=100, description="rounds of samples an update draws from")

    @model_validator(mode="after")
    def _templates_take_a_name(self) -> Self:
        for template in self.prompt_templates:
            if template.count("{}") != 1:
                raise ValueError(f"each prompt template needs exactly one {{}}, and {template!r} has not")
        return self


class RunConfig(_Section):
    """Everything a run can be told."""

    rounds: int = Field(8, ge=1, le=100_000, description="rounds of mutual transfer")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every random choice")
    output_dir: str = Field(
        "", description="absolute folder of the run; empty: that of resume-from, or ~/.fedmmkt/runs/<run id>"
    )
    resume_from: str = Field("", description="absolute folder of an earlier run to go on with")
    checkpoints_kept: int = Field(
        2, ge=0, le=1000, description="last rounds that a run can be resumed from, at server and clients; 0: none"
    )
    feedback: Literal["logits", "logits+votes"] = Field(
        "logits+votes", description="what clients return: the paper's logits, or nearest-neighbour votes too"
    )
    min_nodes: int = Field(2, ge=1, description="connected nodes needed to start")
    node_timeout: float = Field(120, gt=0, description="seconds to wait for them")
    round_deadline: float = Field(3600, gt=0, description="seconds after which a round closes")
    quorum: Fraction = Field(0.5, description="part of the asked nodes that must have answered by then")
    judge: bool = Field(
        True, description="measure the T2I with a classifier trained on the dataset, which the server then must have"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events")
    data: DataConfig = DataConfig()
    client: ClientConfig = ClientConfig()
    t2i: T2IConfig = T2IConfig()

    @classmethod
    def from_flower(cls, run_config: Mapping[str, Any]) -> Self:
        """Check Flower's flat run-config.

        Raises
        ------
        ConfigError
            Names every key that is unknown, missing its type or out of range.
        """
        return _parse(cls, _nested(run_config), "run-config")

    @model_validator(mode="after")
    def _folders_are_absolute(self) -> Self:
        for key, folder in (("output-dir", self.output_dir), ("resume-from", self.resume_from)):
            if folder and not Path(folder).expanduser().is_absolute():
                raise ValueError(
                    f"{key} is {folder!r}; allowed: an absolute path, since Flower's working directory is not yours"
                )
        return self


class NodeConfig(_Section):
    """What a node says of itself: its part of a simulated dataset, or its own data and model."""

    partition_id: int | None = Field(None, ge=0, description="this node's partition; set by the simulation")
    num_partitions: int | None = Field(None, ge=1, description="number of partitions; set by the simulation")
    name: str = Field("", description="name in logs and reports; empty: model and partition or node id")
    model: str = Field(
        "", description="task model, as in `client.models`; empty: taken from `client.models` by partition"
    )
    data_path: str = Field("", description="this node's own dataset, in place of a partition")
    image_column: str = Field("", description="its column of images; empty: the run's `data.image-column`")
    text_column: str = Field("", description="its column of texts; empty: the run's `data.text-column`")
    label_column: str = Field("", description="its column of labels; empty: the run's `data.label-column`")
    state_dir: str = Field(
        "", description="where this node keeps its model and a decoded copy of its data; overrides `client.state-dir`"
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`")

    @classmethod
    def from_flower(cls, node_config: Mapping[str, Any]) -> Self:
        """Check Flower's node-config.

        Raises
        ------
        ConfigError
            Names every key that is unknown or out of range, or says that the node has no data.
        """
        return _parse(cls, dict(node_config), "node-config")

    def own_data(self, data: DataConfig) -> OwnDataConfig:
        """Describe the node's own data: the run's settings, but for what this node names."""
        own = {
            "dataset": self.data_path,
            "image_column": self.image_column,
            "text_column": self.text_column,
            "label_column": self.label_column,
        }
        own = {field: value for field, value in own.items() if value}
        return OwnDataConfig(**{**data.model_dump(), **own}, own_fields=frozenset(own))

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.data_path and (self.partition_id is None or self.num_partitions is None):
            raise ValueError("a node needs `data-path`, or `partition-id` with `num-partitions`")
        return self


def to_flower(config: RunConfig) -> dict[str, bool | int | float | str]:
    """Flatten a configuration into Flower's dotted keys, lists as comma-separated strings."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.model_dump(by_alias=True).items():
        items = (
            {f"{key}.{inner}": content for inner, content in value.items()} if isinstance(value, dict) else {key: value}
        )
        for name, content in items.items():
            flat[name] = ",".join(map(str, content)) if isinstance(content, tuple) else content
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


def _parse(cls: type[_AnySection], values: dict[str, Any], source: str) -> _AnySection:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, item, source) for item in error.errors())) from None


def _explain(cls: type[BaseModel], item: Any, source: str) -> str:
    """One line for one pydantic error: the key, the value, and what is allowed."""
    location = [str(part) for part in item["loc"] if not isinstance(part, int)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        section: Any = cls
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        known = ", ".join(_kebab(name) for name in section.model_fields)
        return f"{source} key {key!r} is unknown; allowed: {known}"
    if not location:
        return f"{source}: {item['msg'].removeprefix('Value error, ')}"
    return f"{source} key {key!r} is {item['input']!r}; allowed: {item['msg'].removeprefix('Value error, ')}"
