"""One client while it handles one message: its data, its model and its memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor, nn

from fedmmkt.client_app.answers import nearest_neighbour_votes, to_payload_logits, vote_features
from fedmmkt.client_app.data.decoded_copy import load_own_data
from fedmmkt.client_app.data.private_data import load_private_data
from fedmmkt.client_app.learning.optimizer import AdamW
from fedmmkt.client_app.learning.prompts_alone import names_prompts_alone, with_own_sight
from fedmmkt.client_app.learning.training import (
    AlignedModel,
    PrivateSet,
    SyntheticSet,
    evaluate,
    parameter_groups,
    predict,
    train,
)
from fedmmkt.client_app.memory import DEFAULT_FOLDER, ClientMemory, KeptBatch, plain_name, remove_old_runs
from fedmmkt.client_app.model_card import write_client_card
from fedmmkt.client_app.models.building import build_task_model, chosen_model, model_label
from fedmmkt.client_app.models.task_model import Inputs, compact
from fedmmkt.client_app.privacy.mode import PrivateMode, has_budget, ledger_of
from fedmmkt.client_app.public_features import PublicFeatures
from fedmmkt.client_app.refusals import RefusedError, refused_as
from fedmmkt.client_app.trained import ModelDescription
from fedmmkt.client_app.vote_network import vote_network
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig
from fedmmkt.common.datasets import Examples
from fedmmkt.common.devices import pick_device
from fedmmkt.common.payloads import (
    ClientReport,
    DistillationPayload,
    FinalEvaluation,
    Instructions,
    PayloadError,
    Request,
    SoftTargets,
    SyntheticBatch,
)

logger = getLogger("flwr")


class Client:
    """One client while it handles one message: its data, its model and its memory.

    Parameters
    ----------
    context : Context
        Flower's context, with the run-config and the node-config.
    instructions : Instructions
        The server's instructions.

    Raises
    ------
    ConfigError
        If a setting cannot be used, or the private data cannot be read.
    """

    def __init__(self, context: Context, instructions: Instructions) -> None:
        with refused_as("configuration", context.node_config):
            self.config = RunConfig.from_flower(context.run_config)
            self.node = NodeConfig.from_flower(context.node_config)
        self.instructions = instructions
        self.device = pick_device(self.node.device)
        torch.set_num_threads(self.config.client.threads)
        with refused_as("model", context.node_config):
            self.model_name = chosen_model(self.config, self.node)
        identity = context.node_id if self.node.partition_id is None else self.node.partition_id
        self.name = self.node.name or f"{model_label(self.model_name)}-{identity}"
        self.seed = zlib.crc32(f"{self.config.seed}/{self.name}".encode())
        self.generator = self._generator(instructions.round)
        with refused_as("model", context.node_config):
            self.model, self.optimizer = self._new_model()
        with refused_as("state folder", context.node_config):
            state_folder, *other_folders = state_folders(self.config, self.node)
            ancestors = zip(instructions.ancestors, instructions.ancestor_rounds, strict=True)
            self.memory = ClientMemory(state_folder, instructions.run_key, self.name, ancestors, other_folders)
            self._load_model()
            if self.node.has_own_data:
                runs = (instructions.run_key, *instructions.ancestors)
                remove_old_runs(state_folder, runs, self.name, self.node.keep_runs, self.node.keep_days)
        modality = self.model.task_model.modality
        self.reads_images, self.reads_texts = "image" in modality, "text" in modality
        data_arguments = (self.config, self.node, instructions.classes, self.reads_images, self.reads_texts)
        self._kept_folder = state_folder.expanduser() / "data" / plain_name(self.name)
        with refused_as("data", context.node_config):
            if self.node.has_own_data:
                self.data = load_own_data(state_folder.expanduser(), self.name, *data_arguments)
            else:
                self.data = _simulated_data(*data_arguments)
        self.private: PrivateMode | None = None
        if has_budget(self.config, self.node):
            with refused_as("privacy ledger", context.node_config):
                folders = [state_folder, *other_folders]
                ledger = ledger_of(self.config, self.node, folders, self.name, instructions)
                self.private = PrivateMode(ledger, instructions, self.data.train)

    def _load_model(self) -> None:
        self.is_new = not self.memory.load_model(self.model, self.optimizer)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Handle one message at a time inside the block: wait for another one that this client still works on."""
        with self.memory.alone() as has_changed:
            if has_changed:
                self._load_model()
            yield

    def receive(self, request: Request) -> None:
        """Store the batches and soft targets of a request."""
        for batch in request.batches:
            self.memory.add_batch(batch)
        for targets in request.targets:
            self.memory.add_targets(targets)

    def learn(self) -> None:
        """Train on private samples and kept synthetic samples, then save the model and the batches.

        A client that has learned in this round already, from an early message, only saves the batches.
        """
        settings, round = self.config.client, self.instructions.round
        # Keep one batch more than training uses, because the newest batch has no soft targets yet.
        keep_batches = settings.pool_rounds + 1
        if self.memory.has_learned_in(round):
            self.memory.save_batches(round, keep_batches)
            return
        if self.is_new:
            self._warn_of_cut("training texts", self.data.train)
            self._warn_of_cut("test texts", self.data.test)
        epochs = settings.warmup_epochs if self.is_new else settings.local_epochs
        train(self.model, self.optimizer, self._private_set, self._synthetic_set(), settings, epochs, self.generator)
        # Keep more rounds than the server, because its last checkpoint is from the round before, and when clients learn
        # early from the one before that.
        self.memory.save(
            round,
            self.model,
            self.optimizer,
            self._description().model_dump(mode="json"),
            keep_batches=keep_batches,
            keep_rounds=self.config.checkpoints_kept + (2 if self.config.learn_early else 1),
        )

    def answer(self, batch: SyntheticBatch) -> DistillationPayload:
        """Return logits for a batch, and votes if run and node use them and the model reads images.

        In private mode, the node returns class counts and votes with noise, and no logits.
        """
        if self.private:
            votes = self.instructions.votes and self.reads_images
            return self.private.answer(batch, self._decoded(batch) if votes else None)
        inputs = self.synthetic_inputs([batch])
        self._warn_of_cut(f"prompts of round {batch.round}", Examples(batch.prompted_N, None, list(batch.prompts)))
        private = self._private_set
        votes_N: np.ndarray | None = None
        if (
            self.instructions.votes
            and (self.node.share_votes or not self.node.has_own_data)
            and inputs.images_BCHW is not None
            and private.inputs.images_BCHW is not None
        ):
            images = private.inputs.images_BCHW, inputs.images_BCHW
            features = vote_features(self._vote_encoder(), *images, self._public_features(*images))
            votes_N = nearest_neighbour_votes(
                features[0], private.labels_N, features[1], self._to_tensor(batch.prompted_N)
            ).numpy()
        return DistillationPayload(
            batch_id=batch.batch_id,
            logits_NC=to_payload_logits(predict(self.model.task_model, inputs)),
            class_counts_C=self._told_class_counts_C(),
            votes_N=votes_N,
        )

    def _vote_encoder(self) -> nn.Module:
        """Return the encoder by which private images vote: the model's own if it is pretrained, else a vote network."""
        encoder = self.model.task_model.image_encoder
        if self.model.task_model.is_pretrained and encoder is not None:
            return encoder
        private, classes = self._private_set, len(self.instructions.classes)
        if private.inputs.images_BCHW is None:
            raise ValueError("votes need private images, and the data hold none")
        file = self._kept_folder / "vote-network.safetensors"
        return vote_network(private.inputs.images_BCHW, private.labels_N, classes, self.config.client, self.seed, file)

    def _public_features(self, private_MCHW: Tensor, synthetic_NCHW: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return features in the run's public encoder; None if it has none, or this client has not got it."""
        if not (name := self.config.client.vote_encoder):
            return None
        try:
            public = PublicFeatures(name, self.node, self._kept_folder / "features.safetensors", self.device)
        except ConfigError as error:
            logger.warning("%s: its votes go without the public encoder: %s", self.name, error)
            return None
        return public.of_private(private_MCHW), public.of(synthetic_NCHW)

    def report(self, measured: bool = True) -> ClientReport:
        """Return the report, with measures of the current model unless they are private or not asked for."""
        kept = self.memory.batches()
        told = self.private.spent() if self.private else {}
        withheld = self.private and self.node.has_own_data  # The test set of a simulation is no client's own.
        if measured and not withheld:
            told |= self._measures
        return ClientReport(
            client=self.name,
            model=model_label(self.model_name),
            modality=self.model.task_model.modality,
            examples=int(self._told_class_counts_C().sum()),
            kept=tuple(item.batch.batch_id for item in kept),
            awaiting=tuple(item.batch.batch_id for item in kept if item.targets is None),
            **told,
        )

    @cached_property
    def _measures(self) -> dict[str, float]:
        """Accuracy and loss of the model, once it has learned what the message brings, on the test part."""
        test = self.data.test
        accuracy, loss = evaluate(self.model.task_model, self._inputs(test), self._to_tensor(test.labels_N))
        return {"accuracy": accuracy, "loss": loss}

    def final_evaluation(self) -> FinalEvaluation:
        """Measure the model by class and, in simulation, a model that learned from private data alone."""
        if self.private and self.node.has_own_data:
            raise RefusedError("the node refused: with its privacy ledger, it gives no measures by class")
        classes = len(self.instructions.classes)
        has_control = self.config.local_only_control and not self.node.has_own_data
        return FinalEvaluation(
            examples_C=self._told_class_counts_C(),
            tested_C=np.bincount(self.data.test.labels_N, minlength=classes),
            correct_C=self._correct_C(self.model),
            alone_correct_C=self._correct_C(self._learn_alone()) if has_control else None,
        )

    def _told_class_counts_C(self) -> np.ndarray:
        """Return the number of private examples of each class, as the server is told it."""
        if self.private:
            return self.private.counts.values_N
        return self._private_set.class_counts(len(self.instructions.classes)).cpu().numpy()

    def _learn_alone(self) -> AlignedModel:
        """Train a new model on private data alone, in as many private epochs as the client's own; nothing is saved.

        The model begins with the same weights and sees the same private batches as in a run without any transfer.
        """
        model, optimizer = self._new_model()
        settings = self.config.client
        for round in range(1, self.instructions.round + 1):
            epochs = settings.warmup_epochs if round == 1 else settings.local_epochs
            train(model, optimizer, self._private_set, None, settings, epochs, self._generator(round))
        return model

    def _correct_C(self, model: AlignedModel) -> np.ndarray:
        """Count the test examples that a model classifies correctly, by class."""
        test = self.data.test
        predicted_N = predict(model.task_model, self._inputs(test)).argmax(1).cpu().numpy()
        return np.bincount(test.labels_N[predicted_N == test.labels_N], minlength=len(self.instructions.classes))

    def _new_model(self) -> tuple[AlignedModel, AdamW]:
        """Build the model, as it is before any training, and its optimiser."""
        torch.manual_seed(self.seed)
        classes, image_size = self.instructions.classes, self.config.data.image_size
        where = "node-config key 'model'" if self.node.model else "run-config key 'client.models'"
        extra = self.config.extra.as_dict()
        task_model = build_task_model(self.model_name, len(classes), image_size, classes, extra, where)
        if self.config.client.trainable == "head":
            task_model.freeze_encoders()
        model = AlignedModel(task_model, self.instructions.anchor_size).to(self.device)
        return model, AdamW(parameter_groups(model, self.config.client), weight_decay=1e-3, fused=True)

    def _generator(self, round: int) -> torch.Generator:
        """Return the generator of the client's random draws in a round."""
        return torch.Generator().manual_seed(self.seed + round)

    def _description(self) -> ModelDescription:
        """Describe the model for who loads it after the run."""
        data = self.node.own_data(self.config.data) if self.node.has_own_data else self.config.data
        return ModelDescription(
            client=self.name,
            model=self.model_name,
            extra=self.config.extra.as_dict(),
            classes=self.instructions.classes,
            class_counts=self._private_set.class_counts(len(self.instructions.classes)).tolist(),
            balanced_softmax=self.config.client.balanced_softmax,
            image_size=self.config.data.image_size,
            whites=dict(self.data.train.whites),
            image_column=data.image_column,
            text_column=data.text_column,
            anchor_size=self.instructions.anchor_size,
            round=self.instructions.round,
        )

    def write_card(self, report: ClientReport) -> None:
        """Write the model card beside the saved model, after the last round."""
        if folder := self.memory.newest:
            rounds = self.instructions.round - 1  # The last message comes after the last round.
            own = self.node.has_own_data
            classes = self.instructions.classes
            if len(self.data.test):  # Without any, there is nothing to say of the model.
                measures = self._measures
                write_client_card(folder, self.model_name, classes, report, measures, self.config, rounds, own)
            self.memory.publish()

    def _warn_of_cut(self, named: str, examples: Examples) -> None:
        """Warn of texts that are longer than what the model reads."""
        if not self.reads_texts or not examples.texts:
            return
        lengths = self.model.task_model.text_lengths(examples.texts)
        if lengths and (cut := lengths.describe_cut()):
            logger.warning("%s (%s): of the %s, %s", self.name, self.model_name, named, cut)

    @cached_property
    def _private_set(self) -> PrivateSet:
        return PrivateSet(self._inputs(self.data.train), self._to_tensor(self.data.train.labels_N))

    def _synthetic_set(self) -> SyntheticSet | None:
        """Join the kept batches that have soft targets; each is sampled half as often as the next newer one."""
        kept = [item for item in self.memory.batches() if item.targets is not None]
        kept = kept[-self.config.client.pool_rounds :]
        if not kept:
            return None
        batches, targets = [item.batch for item in kept], [_targets_of(item) for item in kept]
        alone = [
            names_prompts_alone(soft.probabilities_NC, batch.prompted_N)
            for batch, soft in zip(batches, targets, strict=True)
        ]
        weights = [torch.from_numpy(soft.weights_N) * 0.5**age for age, soft in zip(_ages(kept), targets, strict=True)]
        synthetic = SyntheticSet(
            self.synthetic_inputs(batches),
            self._to_tensor(np.concatenate([soft.probabilities_NC for soft in targets])).float(),
            self._to_tensor(np.concatenate([batch.prompted_N for batch in batches])),
            torch.cat(weights),
            self._anchors(batches),
        )
        # Before it has learned from a batch, a model knows its own classes alone, or nothing.
        if self.is_new or len(kept) == 1 or not any(alone):
            return synthetic
        alone_N = self._to_tensor(np.repeat(alone, [len(batch) for batch in batches]))
        return with_own_sight(synthetic, predict(self.model.task_model, synthetic.inputs).softmax(1), alone_N)

    def _anchors(self, batches: list[SyntheticBatch]) -> Tensor | None:
        """Return the text embedding of each prompt; None unless all batches have them."""
        anchors = [
            batch.anchors_UD[batch.anchor_index_N]
            for batch in batches
            if batch.anchors_UD is not None and batch.anchor_index_N is not None
        ]
        return self._to_tensor(np.concatenate(anchors)).float() if len(anchors) == len(batches) else None

    def synthetic_inputs(self, batches: list[SyntheticBatch]) -> Inputs:
        """Decode images and tokenize prompts, all together, so that prompts are padded alike."""
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        images = [self._decoded(batch) for batch in batches] if self.reads_images else []
        prompted_N = np.concatenate([batch.prompted_N for batch in batches])
        return self._inputs(Examples(prompted_N, np.concatenate(images) if images else None, prompts))

    def _decoded(self, batch: SyntheticBatch) -> np.ndarray:
        images_NHWC = batch.decoded_NHWC(self.config.data.image_size)
        if images_NHWC is None:
            raise PayloadError(f"batch {batch.batch_id!r} came without images, which {self.model_name} reads")
        return images_NHWC

    def _inputs(self, examples: Examples) -> Inputs:
        images_BCHW = tokens_BL = None
        if self.reads_images and examples.images_NHWC is not None:
            images_BCHW = torch.from_numpy(examples.images_NHWC).permute(0, 3, 1, 2).to(self.device)
        if self.reads_texts and examples.texts:
            tokens_BL = compact(self.model.task_model.tokenize(examples.texts)).to(self.device)
        return Inputs(images_BCHW, tokens_BL)

    def _to_tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


# In simulation, one process handles many messages of many clients, so it caches their data.
_simulated_data = lru_cache(maxsize=64)(load_private_data)


def state_folders(config: RunConfig, node: NodeConfig) -> list[Path]:
    """Return the folder of a client's memory, then other folders that may hold its memory of an earlier run.

    A node with data of its own keeps them where its node-config says, or in the default folder. Other clients, which
    are simulated, keep their memory in the run folder, unless a folder is configured.
    """
    if node.has_own_data:
        return [Path(node.state_dir or DEFAULT_FOLDER)]
    if configured := node.state_dir or config.client.state_dir:
        return [Path(configured)]
    runs = [folder for folder in (config.output_dir, config.resume_from) if folder]
    return [*(Path(folder) / "clients" for folder in runs), DEFAULT_FOLDER]


def _targets_of(kept: KeptBatch) -> SoftTargets:
    if kept.targets is None or len(kept.targets.weights_N) != len(kept.batch):
        raise PayloadError(f"soft targets do not match batch {kept.batch.batch_id!r}")
    return kept.targets


def _ages(kept: list[KeptBatch]) -> range:
    """Return how many newer batches there are, for each batch."""
    return range(len(kept) - 1, -1, -1)
