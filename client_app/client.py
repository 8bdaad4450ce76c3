"""One client while it handles one message: its data, its model and its memory."""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor
from torch.nn import functional as F

from fedmmkt.client_app.answers import nearest_neighbour_votes, to_payload_logits, vote_features
from fedmmkt.client_app.data.decoded_copy import load_own_data
from fedmmkt.client_app.data.private_data import load_private_data
from fedmmkt.client_app.learning.optimizer import AdamW
from fedmmkt.client_app.learning.training import (
    AlignedModel,
    PrivateSet,
    SyntheticSet,
    evaluate,
    parameter_groups,
    predict,
    train,
)
from fedmmkt.client_app.memory import DEFAULT_FOLDER, ClientMemory, KeptBatch
from fedmmkt.client_app.models.building import build_task_model, model_label
from fedmmkt.client_app.models.task_model import PADDING, Inputs
from fedmmkt.common.config import NodeConfig, RunConfig
from fedmmkt.common.datasets import Examples
from fedmmkt.common.devices import pick_device
from fedmmkt.common.images import decode_images
from fedmmkt.common.payloads import (
    ClientReport,
    DistillationPayload,
    Instructions,
    PayloadError,
    Request,
    SyntheticBatch,
)


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
        where = "node-config key 'model'" if self.node.model else "run-config key 'client.models'"
        extra = self.config.extra.as_dict()
        task_model = build_task_model(self.model_name, len(classes), image_size, classes, extra, where)
        if self.config.client.trainable == "head":
            task_model.freeze_encoders()
        self.model = AlignedModel(task_model, instructions.anchor_size).to(self.device)
        self.optimizer = AdamW(parameter_groups(self.model, self.config.client), weight_decay=1e-3)
        state_folder, *other_folders = _state_folders(self.config, self.node)
        ancestors = zip(instructions.ancestors, instructions.ancestor_rounds, strict=True)
        self.memory = ClientMemory(state_folder, instructions.run_key, self.name, ancestors, other_folders)
        self.is_new = not self.memory.load_model(self.model, self.optimizer)
        modality = task_model.modality
        self.reads_images, self.reads_texts = "image" in modality, "text" in modality
        data_arguments = (self.config, self.node, instructions.classes, self.reads_images, self.reads_texts)
        if self.node.data_path:
            self.data = load_own_data(state_folder.expanduser(), self.name, *data_arguments)
        else:
            self.data = _simulated_data(*data_arguments)

    def receive(self, request: Request) -> None:
        """Store the batches and soft targets of a request."""
        for batch in request.batches:
            self.memory.add_batch(batch)
        for targets in request.targets:
            self.memory.add_targets(targets)

    def learn(self) -> None:
        """Train on private samples and kept synthetic samples, then save the model and the batches."""
        settings = self.config.client
        epochs = settings.warmup_epochs if self.is_new else settings.local_epochs
        train(self.model, self.optimizer, self._private_set(), self._synthetic_set(), settings, epochs, self.generator)
        description = {
            "client": self.name,
            "model": self.model_name,
            "classes": self.instructions.classes,
            "image_size": self.config.data.image_size,
            "anchor_size": self.instructions.anchor_size,
            "round": self.instructions.round,
        }
        # Keep one batch more than training uses, because the newest batch has no soft targets yet. Keep one round more
        # than the server, because during a round the server's last checkpoint is from the round before.
        self.memory.save(
            self.instructions.round,
            self.model,
            self.optimizer,
            description,
            keep_batches=settings.pool_rounds + 1,
            keep_rounds=self.config.checkpoints_kept + 1,
        )

    def answer(self, batch: SyntheticBatch) -> DistillationPayload:
        """Return logits for a batch, and votes if the run uses them and the model reads images."""
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
        """Measure the current model and return the report."""
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
        """Join the kept batches that have soft targets; each is sampled half as often as the next newer one."""
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


# In simulation, one process handles many messages of many clients, so it caches their data.
_simulated_data = lru_cache(maxsize=64)(load_private_data)


def _state_folders(config: RunConfig, node: NodeConfig) -> list[Path]:
    """Return the folder of a client's memory, then other folders that may hold its memory of an earlier run.

    Unless a folder is configured, simulated clients keep their memory in the run folder.
    """
    if configured := node.state_dir or config.client.state_dir:
        return [Path(configured)]
    runs = [] if node.data_path else [folder for folder in (config.output_dir, config.resume_from) if folder]
    return [*(Path(folder) / "clients" for folder in runs), DEFAULT_FOLDER]


def _join(parts: list[SyntheticSet]) -> SyntheticSet:
    """Concatenate synthetic sets; anchors are kept only if all sets have them."""
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
    """Concatenate token batches, padded to the longest one."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=PADDING) for part in parts])
