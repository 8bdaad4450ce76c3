"""The guard of the T2I model: clients decide whether an update of the adapter is kept (champion and challenger).

The champion is the last accepted adapter, the challenger the newest one. Both make a part of each batch, mixed, and
clients do not know which made what. Their answers compare the two at no further cost. A challenger that they clearly
prefer becomes the champion; one that they clearly do not is taken back, and the next update is smaller. What is between
waits for more answers, for a bounded number of rounds; without a clear preference it is then taken back too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

CLEAR = 1.645  # Standard normal quantile of .95: beyond it, a preference is clear (one-sided).
PATIENCE = 3  # Rounds of answers within which clients must clearly prefer a challenger.
SMALLEST_STEP = 1 / 64

Verdict = Literal["accepted", "undecided", "taken back"]


@dataclass(frozen=True)
class Evidence:
    """A sum of centred ranks of the challenger's samples, and its variance if both adapters were alike.

    Sums of several rounds add up. Positive: the challenger's samples rank higher.
    """

    effect: float = 0.0
    variance: float = 0.0

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.effect + other.effect, self.variance + other.variance)

    @property
    def z(self) -> float:
        """The effect in standard deviations; 0 without evidence."""
        return self.effect / math.sqrt(self.variance) if self.variance > 0 else 0.0


@dataclass(frozen=True)
class Opinion:
    """What clients say about each sample of a batch, by one measure.

    Attributes
    ----------
    values_KN : torch.Tensor
        One row per client, of any scale, for only its ranks count.
    weights_KN : torch.Tensor
        How much the client's opinion on the sample counts, not negative.
    """

    values_KN: Tensor
    weights_KN: Tensor

    def of(self, chosen_N: Tensor) -> Opinion:
        """Return what clients say about the chosen samples (bool, samples)."""
        return Opinion(self.values_KN[:, chosen_N], self.weights_KN[:, chosen_N])


def compare(opinion: Opinion, challenger_N: Tensor, group_N: Tensor) -> Evidence:
    """Compare the samples of two adapters by the clients' ranks (van Elteren's stratified rank test).

    Each client ranks the samples of a group; no value of it counts for more than a rank, so its influence is bounded by
    its weight. If both adapters were alike, each division of a group's samples between them would be as likely as the
    real one: the variance follows from that (it is that of the permutation test), and so holds what clients have in
    common, and the noise in private votes.

    Parameters
    ----------
    opinion : Opinion
        The clients' values and weights.
    challenger_N : torch.Tensor
        bool, whether the challenger made the sample.
    group_N : torch.Tensor
        int64; samples are compared with those of the same group: the class that their prompts name.
    """
    total = Evidence()
    for group in group_N.unique().tolist():
        chosen_N = group_N == group
        arm_M = challenger_N[chosen_N]
        size, made = len(arm_M), int(arm_M.sum())
        if made in (0, size):
            continue
        ranks_KM = centred_ranks(opinion.values_KN[:, chosen_N].double())
        ranks_M = (opinion.weights_KN[:, chosen_N].double() * ranks_KM).sum(0)
        ranks_M = ranks_M - ranks_M.mean()
        variance = made * (size - made) / (size * (size - 1)) * float(ranks_M.square().sum())
        total += Evidence(float(ranks_M[arm_M].sum()), variance)
    return total


def centred_ranks(values_KM: Tensor) -> Tensor:
    """Return the rank of each value in its row, centred, and scaled into (-1/2, 1/2); equal values share a rank."""
    return torch.from_numpy(rankdata(values_KM.numpy(), axis=1)) / (values_KM.shape[1] + 1) - 0.5


@dataclass(frozen=True)
class Trial:
    """A challenger on trial.

    Attributes
    ----------
    challenger : dict of str to torch.Tensor
        Its tensors.
    evidence : dict of str to Evidence
        What clients said of it and of the champion so far, by measure: votes, agreement.
    made : tuple of torch.Tensor
        For each answered batch of the trial, which samples the challenger made (bool, samples), oldest first.
    """

    challenger: dict[str, Tensor]
    evidence: dict[str, Evidence] = field(default_factory=dict)
    made: tuple[Tensor, ...] = ()

    def with_batch(self, made_N: Tensor) -> Trial:
        """Return the trial with one more answered batch."""
        return replace(self, made=(*self.made, made_N))


@dataclass(frozen=True)
class Arms:
    """Who made the samples of a batch: the champion, the challenger of a trial, or the unadapted T2I.

    Attributes
    ----------
    made_N : torch.Tensor
        bool, whether the challenger made the sample.
    challenger : dict of str to torch.Tensor
        Its tensors. If the batch was made ahead, that of the trial may have learned since.
    number : int
        The number of the trial.
    base_N : torch.Tensor
        bool, whether the unadapted T2I made the sample.
    """

    made_N: Tensor
    challenger: dict[str, Tensor]
    number: int
    base_N: Tensor

    @property
    def champion_N(self) -> Tensor:
        """Whether the champion made the sample (bool)."""
        return ~(self.made_N | self.base_N)


@dataclass(frozen=True)
class GuardState:
    """The state of the guard between rounds. The champion is the generator's own adapter.

    Attributes
    ----------
    trial : Trial or None
        The challenger, if there is one.
    step : float
        Factor of the learning rate: halved when a challenger is taken back, doubled up to 1 when one is accepted.
    trusted : bool
        Whether the last trial was not taken back. If it was, the next challenger makes the smaller part of a batch, so
        that clients learn little from it.
    number : int
        Number of trials that have ended, which is that of the present one.
    base_worth : float
        What the unadapted T2I's new images are worth beside those of champion and challenger: the former's mean score
        divided by the sum of both means, over the rounds that judged a trial, each with half the weight of the next.
    """

    trial: Trial | None = None
    step: float = 1.0
    trusted: bool = True
    number: int = 0
    base_worth: float = 0.5

    def to_json(self) -> dict[str, Any]:
        """Return what is not a tensor."""
        evidence = self.trial.evidence if self.trial else {}
        sums = {name: [found.effect, found.variance] for name, found in evidence.items()}
        plain = {"step": self.step, "trusted": self.trusted, "number": self.number, "base_worth": self.base_worth}
        return plain | {"evidence": sums}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; none without a challenger."""
        if self.trial is None:
            return {}
        made = {f"made/{index:05d}": made_N for index, made_N in enumerate(self.trial.made)}
        return made | {f"challenger/{name}": tensor for name, tensor in self.trial.challenger.items()}

    @classmethod
    def from_parts(cls, described: dict[str, Any], tensors: dict[str, Tensor]) -> GuardState:
        """Return the state of `to_json` and `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"made": {}, "challenger": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        trial = None
        if parts["challenger"]:
            evidence = {name: Evidence(*sums) for name, sums in described["evidence"].items()}
            trial = Trial(parts["challenger"], evidence, tuple(parts["made"][key] for key in sorted(parts["made"])))
        number, base_worth = described.get("number", 0), described.get("base_worth", cls.base_worth)
        return cls(trial, described["step"], described["trusted"], number, base_worth)


NO_TRIAL = GuardState()
"""The state before the first update."""


def decide(evidence: dict[str, Evidence], rounds: int) -> Verdict:
    """Decide on a challenger; pure.

    Votes (whether samples look real) and agreement (whether they show what the prompt says) are looked at apart. It is
    accepted if one clearly prefers it and the other is not clearly against it, and taken back in the opposite case.
    After `PATIENCE` rounds without a clear preference it is taken back, for it may harm; if both are clear, and
    contradict each other, the clearer one decides then.

    Parameters
    ----------
    evidence : dict of str to Evidence
        By measure, over all rounds of the trial.
    rounds : int
        Rounds of the trial, with this one.
    """
    scores = [found.z for found in evidence.values()]
    better, worse = any(z >= CLEAR for z in scores), any(z <= -CLEAR for z in scores)
    if better != worse:
        return "accepted" if better else "taken back"
    if rounds < PATIENCE:
        return "undecided"
    # Both are clear, or neither is.
    return "accepted" if better and sum(scores) > 0 else "taken back"


def after_round(state: GuardState, found: dict[str, Evidence]) -> tuple[GuardState, Verdict, dict[str, Evidence]]:
    """Return the state after a round of answers, the verdict, and the evidence for it; pure.

    After "accepted" and "taken back", the trial has ended; after "undecided" it goes on.

    Parameters
    ----------
    state : GuardState
        The state before; with a trial, whose last batch is that of the round.
    found : dict of str to Evidence
        What the clients said of this batch, by measure.
    """
    trial = state.trial
    if trial is None:
        raise ValueError("no challenger is on trial")
    evidence = {
        name: found.get(name, Evidence()) + trial.evidence.get(name, Evidence())
        for name in sorted({*found, *trial.evidence})
    }
    verdict = decide(evidence, len(trial.made))
    if verdict == "undecided":
        return replace(state, trial=replace(trial, evidence=evidence)), verdict, evidence
    step = min(1.0, 2 * state.step) if verdict == "accepted" else max(SMALLEST_STEP, state.step / 2)
    return (
        replace(state, trial=None, step=step, trusted=verdict == "accepted", number=state.number + 1),
        verdict,
        evidence,
    )


def worth_of_base(before: float, scores_N: Tensor, base_N: Tensor, adapted_N: Tensor) -> float:
    """Return `GuardState.base_worth` after a batch; pure.

    Parameters
    ----------
    before : float
        That before it.
    scores_N : torch.Tensor
        The scores of the samples, not negative.
    base_N, adapted_N : torch.Tensor
        bool, the new images of the unadapted T2I and of an adapted one.
    """
    if not bool(base_N.any()) or not bool(adapted_N.any()):
        return before
    base, adapted = (float(scores_N[chosen_N].double().mean()) for chosen_N in (base_N, adapted_N))
    return (before + base / (base + adapted)) / 2 if base + adapted > 0 else before


def spread_part(group_N: Sequence[int] | np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose the samples that one of two models makes: ``share`` of them, spread over the groups, else at random.

    Returns
    -------
    numpy.ndarray
        Positions, ascending; at least one, and not all if there are two.
    """
    count = len(group_N)
    wanted = min(max(1, round(share * count)), max(1, count - 1))
    order = np.random.default_rng(seed).permutation(count)
    by_group = order[np.argsort(np.asarray(group_N)[order], kind="stable")]
    return np.sort(by_group[(np.arange(wanted) * count) // wanted])
