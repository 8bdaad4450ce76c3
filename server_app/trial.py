"""Batches of champion, challenger and unadapted T2I, and what clients say of them: the guard's rules at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from flwr.supercore import log
from torch import Tensor

from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.guard import (
    CLEAR,
    PATIENCE,
    Arms,
    Opinion,
    Trial,
    after_round,
    compare,
    spread_part,
    worth_of_base,
)
from fedmmkt.server_app.ledger import Ledger
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.rules.scores import Feedback
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples


def opinions(answers: Sequence[Answer], prompted_N: Tensor, text_consensus_NC: Tensor | None) -> dict[str, Opinion]:
    """Return what clients say of a batch, by measure: votes, and agreement with the prompt.

    A client counts by the root of its number of private images of the prompted class; on prompts that name no class, of
    all its images. Agreement is judged by those whose answers score samples: image clients, and image+text clients on
    classes that no image client holds.

    Parameters
    ----------
    answers : sequence of Answer
        The answers of the round.
    prompted_N : torch.Tensor
        int64; the class that each prompt names, -1 for none.
    text_consensus_NC : torch.Tensor, optional
        What text clients read in the prompts, as in `Feedback`.
    """
    votes, agreement = [], []
    held_C = sum(torch.from_numpy(a.required_payload.class_counts_C) for a in answers if a.report.modality == "image")
    for answer in answers:
        payload = answer.required_payload
        counts_C = torch.from_numpy(payload.class_counts_C).clamp_min(0).double()
        weights_N = _by_prompt(counts_C, prompted_N).sqrt()
        if payload.votes_N is not None:
            votes.append((torch.from_numpy(payload.votes_N), weights_N))
        if payload.logits_NC is None or answer.report.modality == "text":
            continue
        if answer.report.modality == "image+text" and isinstance(held_C, Tensor):
            weights_N = weights_N * (_by_prompt(held_C, prompted_N) == 0)
        probabilities_NC = torch.from_numpy(payload.logits_NC).float().softmax(-1)
        seen_N = Feedback(probabilities_NC, prompted_N, None, text_consensus_NC).agreement_N()
        agreement.append((seen_N, weights_N))
    found = {"votes": votes, "agreement": agreement}
    return {
        name: Opinion(*(torch.stack(rows) for rows in zip(*said, strict=True))) for name, said in found.items() if said
    }


def _by_prompt(counts_C: Tensor, prompted_N: Tensor) -> Tensor:
    """Return the count of the class that each prompt names, and the whole for a prompt that names none."""
    return torch.where(prompted_N >= 0, counts_C[prompted_N.clamp_min(0)], counts_C.sum())


class Guard:
    """Makes batches of champion, challenger and unadapted T2I, and acts on what clients say of them.

    The generator always holds the champion, except while another one generates or learns.

    Parameters
    ----------
    share : float
        The part that tests, of what champion and challenger make: the champion's, or that of a challenger after one was
        taken back. At 0, every update is kept, untested.
    generator : Generator
        The T2I model.
    ledger : Ledger
        Holds the state between rounds, and the pool.
    explore : float
        The first part of what each adapter makes that varies earlier samples. New samples are compared with new ones;
        variations that no adapter denoises say nothing of either, and do not count.
    most_base : float
        The largest part of a batch that the unadapted T2I makes, once clients have accepted an update. None without a
        guard.
    """

    def __init__(
        self, share: float, generator: Generator, ledger: Ledger, explore: float = 0.0, most_base: float = 0.0
    ) -> None:
        self.share, self.generator, self.ledger = share, generator, ledger
        self.explore, self.most_base = explore, most_base

    @property
    def base_share(self) -> float:
        """The fraction of a batch that the unadapted T2I makes: by what its images are worth beside adapted ones.

        It is 0 until a trial has ended, and as long as the champion is the unadapted T2I itself. With it, what clients
        learn from keeps the variety with which the T2I began, however far it adapts.
        """
        state = self.ledger.guard
        adapted = bool(self.share) and state.number > 0 and not self.generator.adapter.is_unadapted
        return min(self.most_base, state.base_worth) if adapted else 0.0

    @property
    def explored_share(self) -> float:
        """The fraction of an adapter's samples that vary earlier ones: ``explore``, or 0 if clients are not for it.

        With a guard, that is until they have accepted an update, and after one was taken back. Variations take the
        place of new samples, from which clients learn more where the T2I does not improve.
        """
        state = self.ledger.guard
        return self.explore if not self.share or (state.number > 0 and state.trusted) else 0.0

    def generate(
        self, prompts: Sequence[Prompt], seed: int, generate: Callable[[list[Prompt], bool], Samples]
    ) -> tuple[Samples, Arms | None]:
        """Generate a batch: parts of it by the champion, the challenger on trial, and the unadapted T2I.

        Parameters
        ----------
        prompts : sequence of Prompt
            One per sample.
        seed : int
            Seed of who makes what.
        generate : callable
            Generates images for prompts with the adapter that the generator holds; the flag says whether all are new.

        Returns
        -------
        tuple
            The samples and who made them; None if no challenger is on trial.
        """
        state, trial, adapter = self.ledger.guard, self.ledger.guard.trial, self.generator.adapter
        groups = np.array([prompt.class_index for prompt in prompts])
        made_N, base_N = (torch.zeros(len(prompts), dtype=torch.bool) for _ in range(2))
        base_share = self.base_share
        if trial is None and not base_share:
            return generate(list(prompts), False), None
        if base_share and len(prompts) > 2:  # Champion and challenger have one sample each at least.
            base_N[spread_part(groups, min(base_share, 1 - 2 / len(prompts)), seed + 1)] = True
        rest = torch.nonzero(~base_N)[:, 0].numpy()
        if trial is not None:
            share = self.share if state.trusted else 1 - self.share
            made_N[rest] = True
            made_N[rest[spread_part(groups[rest], share, seed)]] = False

        def part(chosen_N: Tensor, new: bool = False) -> Iterator[tuple[list[int], Samples]]:
            if positions := torch.nonzero(chosen_N)[:, 0].tolist():
                yield positions, generate([prompts[index] for index in positions], new)

        def parts() -> Iterator[tuple[list[int], Samples]]:
            yield from part(~(made_N | base_N))
            if bool(base_N.any()):
                with adapter.holding(adapter.unadapted):
                    yield from part(base_N, new=True)
            if trial is not None:
                with adapter.holding(trial.challenger):
                    yield from part(made_N)

        samples = Samples.gather(parts(), len(prompts))
        return samples, None if trial is None else Arms(made_N, trial.challenger, state.number, base_N)

    def judge(
        self, answers: Sequence[Answer], prompted_N: Tensor, text_consensus_NC: Tensor | None
    ) -> dict[str, Any] | None:
        """Decide on the challenger by the answers to a batch.

        An accepted one becomes the champion, as it was when it made the batch; what it has learned since is the next
        challenger. What one that is taken back has made leaves the pool, in which the batch already is.

        A batch that was made ahead may come after the end of its trial. It then decides nothing, for it does not
        compare the present two.

        Returns
        -------
        dict or None
            For ``metrics.jsonl``: the verdict, the preference for the challenger by measure in standard deviations, the
            rounds of the trial, the factor of the next update's learning rate, and `base_share` from now on. None if no
            challenger of the present trial made a part of the batch.
        """
        arms, state = self.ledger.arms, self.ledger.guard
        if arms is None:
            return None
        if state.trial is None or arms.number != state.number:
            if not state.trusted:  # Its trial was the last one.
                self.ledger.pool = _without(self.ledger.pool, (arms.made_N,))
            return None
        trial = state.trial.with_batch(arms.made_N)
        said = opinions(answers, prompted_N, text_consensus_NC)
        varied_N = varied((arms.made_N, arms.champion_N), self.explored_share)
        tested_N = ~arms.base_N if self.generator.config.explore_strength else ~(varied_N | arms.base_N)
        group_N = 2 * prompted_N + varied_N
        found = {
            name: compare(opinion.of(tested_N), arms.made_N[tested_N], group_N[tested_N])
            for name, opinion in said.items()
        }
        state = replace(state, trial=trial, base_worth=self._base_worth(arms, ~varied_N))
        state, verdict, evidence = after_round(state, found)
        if verdict == "accepted":
            self.generator.adapter.load_state(arms.challenger, "an adapter on trial")
            if _differ(trial.challenger, arms.challenger):
                state = replace(state, trial=Trial(trial.challenger))
        elif verdict == "taken back":
            self.ledger.pool = _without(self.ledger.pool, trial.made)
        self.ledger.guard = state
        preference = {name: round(evidence[name].z, 3) for name in evidence}
        told = {"rounds": len(trial.made), "step": state.step, "base_share": round(self.base_share, 3)}
        return {"verdict": verdict, "preference": preference} | told

    def _base_worth(self, arms: Arms, new_N: Tensor) -> float:
        """Return `GuardState.base_worth` after the scored batch of these arms, by its new images (bool, samples)."""
        unadapted_N = ~arms.made_N if self.generator.adapter.is_unadapted else arms.base_N
        before, scores_N = self.ledger.guard.base_worth, self.ledger.pool[-1].scores_N
        if scores_N is None:
            return before
        return worth_of_base(before, scores_N, unadapted_N & new_N, ~unadapted_N & new_N)

    def update(self, adapt: Callable[[], float | None]) -> float | None:
        """Let the challenger learn with ``adapt``, or a new one that starts as the champion; return the loss.

        Without a guard, the generator's own adapter learns.
        """
        if not self.share:
            return adapt()
        champion, trial = self._snapshot(), self.ledger.guard.trial
        with self.generator.adapter.holding(trial.challenger if trial else champion):
            loss = adapt()
            updated = self._snapshot()
        if trial is not None:
            self.ledger.guard = replace(self.ledger.guard, trial=replace(trial, challenger=updated))
        elif _differ(updated, champion):
            self.ledger.guard = replace(self.ledger.guard, trial=Trial(updated))
        return loss

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.generator.adapter.state().items()}


def _differ(some: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(some[name], other[name]) for name in other)


def varied(arms: Sequence[Tensor], explore: float) -> Tensor:
    """Return which samples vary earlier ones (bool, samples): the first ones of each adapter, by ``explore``."""
    varied_N = torch.zeros(len(arms[0]), dtype=torch.bool)
    for arm_N in arms:
        own = torch.nonzero(arm_N)[:, 0]
        varied_N[own[: int(len(own) * explore)]] = True
    return varied_N


def _without(pool: Sequence[Samples], made: Sequence[Tensor]) -> list[Samples]:
    """Return the pool without what a challenger made in the last rounds, as ``made`` says for each (bool, samples)."""
    of_trial = made[-len(pool) :]
    first = len(pool) - len(of_trial)
    kept = [
        samples.select(torch.nonzero(~made_N)[:, 0].numpy())
        for samples, made_N in zip(pool[first:], of_trial, strict=True)
    ]
    return [*pool[:first], *kept]


def log_verdict(judged: Mapping[str, Any]) -> None:
    """Show in plain words what `Guard.judge` returned."""
    verdict, preference = judged["verdict"], judged["preference"]
    figures = ", ".join(f"{name} {z:+.1f} sd" for name, z in preference.items()) or "nobody compared the two"
    share = judged["base_share"]
    base = f"; the unadapted T2I now makes {share:.0%} of a batch" if share else ""
    if verdict == "accepted":
        log(INFO, "  guard     the T2I's update is accepted: clients prefer its images (%s)%s", figures, base)
    elif verdict == "undecided":
        log(INFO, "  guard     the T2I's update waits: not clear yet (%s), round %s of at most %s%s",
            figures, judged["rounds"], PATIENCE, base)  # fmt: skip
    else:
        refused = any(z <= -CLEAR for z in preference.values())
        why = "prefer the images before it" if refused else f"do not clearly prefer its images in {PATIENCE} rounds"
        log(WARNING, "  guard     the T2I's update is taken back: clients %s (%s); the next has %g of the learning "
                     "rate%s", why, figures, judged["step"], base)  # fmt: skip
