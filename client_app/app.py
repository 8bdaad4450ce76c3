"""The ClientApp: one message a round, answered with logits.

``train`` learns and answers the new batch; ``train.distill`` learns a last time; ``evaluate`` changes nothing.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.nn import functional as F

from client_app.decoded_copy import load_own_data
from client_app.feedback import nearest_neighbour_votes, to_payload_logits, vote_features
from client_app.learning import AlignedModel, PrivateSet, SyntheticSet, evaluate, parameter_groups, predict, train
from client_app.memory import DEFAULT_FOLDER, ClientMemory, KeptBatch
from client_app.optimizer import AdamW
from client_app.private_data import PrivateData, held_classes, load_private_data
from client_app.task_models import PADDING, Inputs, build_task_model, model_label
from common.config import NodeConfig, RunConfig
from common.datasets import Examples
from common.devices import pick_device
from common.images import decode_images
from common.payloads import (
    ClassReport,
    ClientReport,
    DistillationPayload,
    Instructions,
    PayloadError,
    Request,
    SyntheticBatch,
)

app = ClientApp()


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Distil the last soft targets, train on private data, and answer the new batch."""
    request = Request.from_content(message.content)
    if not request.batches:
        raise PayloadError("a round needs a synthetic batch, and the message holds none")
    client = Client(context, request.instructions)
    client.receive(request)
    client.learn()
    payload = client.answer(request.batches[-1])
    return Message(
        RecordDict({**client.report().to_records("report"), **payload.to_records("payload")}), reply_to=message
    )


@app.train("distill")
def distill(message: Message, context: Context) -> Message:
    """Distil the last soft targets and report, without a new batch."""
    request = Request.from_content(message.content)
    client = Client(context, request.instructions)
    client.receive(request)
    client.learn()
    return Message(RecordDict(client.report().to_records("report")), reply_to=message)


@app.evaluate()
def evaluate_model(message: Message, context: Context) -> Message:
    """Report on the model as it is."""
    client = Client(context, Request.from_content(message.content).instructions)
    return Message(RecordDict(client.report().to_records("report")), reply_to=message)


@app.query("classes")
def name_classes(message: Message, context: Context) -> Message:
    """Tell which classes this client holds."""
    config, node = RunConfig.from_flower(context.run_config), NodeConfig.from_flower(context.node_config)
    report = ClassReport(classes=held_classes(config, node))
    return Message(RecordDict(dict(report.to_records("classes"))), reply_to=message)


class Client:
    """One client in one message: its data, its model as it last was, and its memory.

    Parameters
    ----------
    context : Context
        Flower's; holds the run's and the node's configuration.
    instructions : Instructions
        The server's.

    Raises
    ------
    ConfigError
        If a setting cannot be used, or the private data cannot be read.
    """

    def __init__(self, context: Context, instructions: Instructions) -> None:
        self.config = RunConfig.from_flower(context.run_config)
        self.node = NodeConfig.from_flower(context.node_config)
        self.instructions = instructions
        self.device = pick_device(self.node.device)
        torch.set_num_threads(self.config.client.threads)
        models = self.config.client.models
        self.model_name = self.node.model or models[(self.node.partition_id or 0) % len(models)]
        identity = context.node_id if self.node.partition_id is None else self.node.partition_id
        self.name = self.node.name or f"{model_label(self.model_name)}-{identity}"
        seed = zlib.crc32(f"{self.config.seed}/{self.name}".encode())
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed + instructions.round)

        classes, image_size = instructions.classes, self.config.data.image_size
        task_model = build_task_model(self.model_name, len(classes), image_size, classes)
        if self.config.client.trainable == "head":
            task_model.freeze_encoders()
        self.model = AlignedModel(task_model, instructions.anchor_size).to(self.device)
        self.optimizer = AdamW(parameter_groups(self.model, self.config.client), weight_decay=1e-3)
        state_folder, *elsewhere = _state_folders(self.config, self.node)
        ancestors = zip(instructions.ancestors, instructions.ancestor_rounds, strict=True)
        self.memory = ClientMemory(state_folder, instructions.run_key, self.name, ancestors, elsewhere)
        self.is_new = not self.memory.load_model(self.model, self.optimizer)
        modality = task_model.modality
        self.reads_images, self.reads_texts = "image" in modality, "text" in modality
        wanted = (self.config, self.node, instructions.classes, self.reads_images, self.reads_texts)
        if self.node.data_path:
            self.data = load_own_data(state_folder.expanduser(), self.name, *wanted)
        else:
            self.data = _simulated_data(*wanted)

    def receive(self, request: Request) -> None:
        """Take in what the server sent."""
        for batch in request.batches:
            self.memory.add_batch(batch)
        for targets in request.targets:
            self.memory.add_targets(targets)

    def learn(self) -> None:
        """Train on private and kept synthetic samples; keep the new model and the batches."""
        settings = self.config.client
        epochs = settings.warmup_epochs if self.is_new else settings.local_epochs
        train(self.model, self.optimizer, self._private_set(), self._synthetic_set(), settings, epochs, self.generator)
        described = {
            "client": self.name,
            "model": self.model_name,
            "classes": self.instructions.classes,
            "image_size": self.config.data.image_size,
            "anchor_size": self.instructions.anchor_size,
            "round": self.instructions.round,
        }
        # A batch more than are drawn from, since the newest has no soft targets yet; a round more than the server
        # keeps, since in mid-round its last checkpoint is of the round before.
        self.memory.save(
            self.instructions.round,
            self.model,
            self.optimizer,
            described,
            keep_batches=settings.pool_rounds + 1,
            keep_rounds=self.config.checkpoints_kept + 1,
        )

    def answer(self, batch: SyntheticBatch) -> DistillationPayload:
        """Return logits on a batch, and votes where the run asks for them and the model sees images."""
        inputs = self._synthetic_inputs(batch)
        private = self._private_set()
        votes_N: np.ndarray | None = None
        encoder = self.model.task_model.image_encoder
        if (
            self.instructions.votes
            and encoder is not None
            and inputs.images_BCHW is not None
            and private.inputs.images_BCHW is not None
        ):
            features = vote_features(encoder, private.inputs.images_BCHW, inputs.images_BCHW)
            votes_N = nearest_neighbour_votes(
                features[0], private.labels_N, features[1], self._to_tensor(batch.prompted_N)
            ).numpy()
        return DistillationPayload(
            batch_id=batch.batch_id,
            logits_NC=to_payload_logits(predict(self.model.task_model, inputs)),
            class_counts_C=private.class_counts(len(self.instructions.classes)).cpu().numpy(),
            votes_N=votes_N,
        )

    def report(self) -> ClientReport:
        """Measure the present model."""
        test, kept = self.data.test, self.memory.batches()
        accuracy, loss = evaluate(self.model.task_model, self._inputs(test), self._to_tensor(test.labels_N))
        return ClientReport(
            client=self.name,
            model=model_label(self.model_name),
            modality=self.model.task_model.modality,
            examples=len(self.data.train),
            accuracy=accuracy,
            loss=loss,
            kept=tuple(item.batch.batch_id for item in kept),
            awaiting=tuple(item.batch.batch_id for item in kept if item.targets is None),
        )

    def _private_set(self) -> PrivateSet:
        return PrivateSet(self._inputs(self.data.train), self._to_tensor(self.data.train.labels_N))

    def _synthetic_set(self) -> SyntheticSet | None:
        """Join the kept batches that have soft targets; each is drawn half as often as the next newer one."""
        kept = [item for item in self.memory.batches() if item.targets is not None]
        kept = kept[-self.config.client.pool_rounds :]
        parts = [self._synthetic_part(item, 0.5 ** (len(kept) - 1 - age)) for age, item in enumerate(kept)]
        return _join(parts) if parts else None

    def _synthetic_part(self, kept: KeptBatch, recency: float) -> SyntheticSet:
        batch, targets = kept.batch, kept.targets
        if targets is None or len(targets.weights_N) != len(batch):
            raise PayloadError(f"soft targets do not match batch {batch.batch_id!r}")
        anchors_ND = None
        if batch.anchors_UD is not None and batch.anchor_index_N is not None:
            anchors_ND = self._to_tensor(batch.anchors_UD[batch.anchor_index_N]).float()
        return SyntheticSet(
            self._synthetic_inputs(batch),
            self._to_tensor(targets.probabilities_NC).float(),
            self._to_tensor(batch.prompted_N),
            torch.from_numpy(targets.weights_N) * recency,
            anchors_ND,
        )

    def _synthetic_inputs(self, batch: SyntheticBatch) -> Inputs:
        images_NHWC = None
        if self.reads_images:
            if batch.images is None or batch.offsets is None:
                raise PayloadError(f"batch {batch.batch_id!r} came without images, which {self.model_name} reads")
            images_NHWC = decode_images(batch.images, batch.offsets, self.config.data.image_size)
        return self._inputs(Examples(batch.prompted_N, images_NHWC, list(batch.prompts)))

    def _inputs(self, examples: Examples) -> Inputs:
        images_BCHW = tokens_BL = None
        if self.reads_images and examples.images_NHWC is not None:
            images_BCHW = torch.from_numpy(examples.images_NHWC).permute(0, 3, 1, 2).to(self.device)
        if self.reads_texts and examples.texts is not None:
            tokens_BL = self.model.task_model.tokenize(examples.texts).to(self.device)
        return Inputs(images_BCHW, tokens_BL)

    def _to_tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


# In simulation one process serves many messages of many clients.
_simulated_data = lru_cache(maxsize=64)(load_private_data)


def _state_folders(config: RunConfig, node: NodeConfig) -> list[Path]:
    """Name the folder of a client's memory, then others in which that of an earlier run may lie.

    Simulated clients keep it with the run that they are part of.
    """
    if named := node.state_dir or config.client.state_dir:
        return [Path(named)]
    runs = [] if node.data_path else [folder for folder in (config.output_dir, config.resume_from) if folder]
    return [*(Path(folder) / "clients" for folder in runs), DEFAULT_FOLDER]


def _join(parts: list[SyntheticSet]) -> SyntheticSet:
    images = [part.inputs.images_BCHW for part in parts if part.inputs.images_BCHW is not None]
    tokens = [part.inputs.tokens_BL for part in parts if part.inputs.tokens_BL is not None]
    anchors = [part.anchors_ND for part in parts if part.anchors_ND is not None]
    return SyntheticSet(
        Inputs(torch.cat(images) if images else None, _join_tokens(tokens) if tokens else None),
        torch.cat([part.probabilities_NC for part in parts]),
        torch.cat([part.prompted_N for part in parts]),
        torch.cat([part.weights_N for part in parts]),
        torch.cat(anchors) if len(anchors) == len(parts) else None,
    )


def _join_tokens(parts: list[Tensor]) -> Tensor:
    """Join token batches, padded to the longest."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=PADDING) for part in parts])


__all__ = ["Client", "PrivateData", "app"]
