"""Aggregation in parts: the same as in one, with memory that does not grow with the clients."""

from functools import partial

import numpy as np
import pytest
import torch

from fedmmkt.common.config import ConfigError
from fedmmkt.server_app.rules import streaming
from fedmmkt.server_app.rules.aggregation import aggregations
from fedmmkt.server_app.rules.checks import check_result
from fedmmkt.server_app.rules.streaming import aggregate, by_sample
from fedmmkt.server_app.rules.sureness import scale_of
from tests.memory import forget_peak, needs_peak, peak

CHECK = partial(check_result, key="t2i.aggregation", name="own")


def answers(clients, samples, classes, seed=0):
    rng = np.random.default_rng(seed)
    logits = [(rng.standard_normal((samples, classes)) * 4).astype(np.float16) for _ in range(clients)]
    counts_KC = torch.from_numpy(rng.integers(0, 200, (clients, classes)))
    return logits, counts_KC, torch.from_numpy(rng.integers(-1, classes, samples))


def in_one(rule, logits, counts_KC, prompted_N):
    return rule(torch.stack([torch.from_numpy(logits_NC).float() for logits_NC in logits]), counts_KC, prompted_N)


@pytest.mark.parametrize("name", sorted(aggregations.names()))
def test_parts_give_what_the_whole_gives(name, monkeypatch):
    """As many clients, samples and classes as in the demo, bit for bit; and in parts of one sample, or of a few."""
    rule, given = aggregations.get(name), answers(6, 400, 10)
    whole_NC = in_one(rule, *given)
    parts = []
    for at_once in (2**20, 70, 1):
        monkeypatch.setattr(streaming, "AT_ONCE", at_once)
        monkeypatch.setattr(streaming, "STACKED_AT_ONCE", at_once)
        parts.append(aggregate(rule, *given, CHECK))

    for part_NC in parts:
        assert torch.allclose(part_NC, whole_NC, rtol=0, atol=1e-6)
    assert name == "entropy" or torch.equal(parts[0], whole_NC)  # That takes the softmax by its logarithm.


@pytest.mark.parametrize("name", ["energy", "min-ce"])
def test_parts_are_brought_to_one_scale_as_the_whole_is(name, monkeypatch):
    """The scale of the clients' logits is that of all their samples, in whatever parts these come."""
    rule, (logits, counts_KC, prompted_N) = aggregations.get(name), answers(6, 40, 5)
    logits[2] = logits[2] * 5
    stacked_KNC = torch.stack([torch.from_numpy(logits_NC).float() for logits_NC in logits])
    whole_NC = rule(scale_of(logits)(stacked_KNC), counts_KC, prompted_N)
    monkeypatch.setattr(streaming, "AT_ONCE", 35)
    monkeypatch.setattr(streaming, "STACKED_AT_ONCE", 35)

    part_NC = aggregate(rule, logits, counts_KC, prompted_N, CHECK, scale_of(logits))

    assert torch.allclose(part_NC, whole_NC, atol=1e-6)
    assert not torch.allclose(part_NC, rule(stacked_KNC, counts_KC, prompted_N), atol=1e-3)


def test_a_rule_of_ones_own_gets_all_samples_unless_it_says_that_it_needs_them_one_by_one(monkeypatch):
    monkeypatch.setattr(streaming, "STACKED_AT_ONCE", 6)
    seen = []

    def own(logits_KNC, class_counts_KC, prompted_N, *, sharp=1.0):
        seen.append((tuple(logits_KNC.shape), len(prompted_N)))
        return (sharp * logits_KNC).softmax(-1).mean(0)

    given = answers(2, 5, 3)
    whole_NC = aggregate(own, *given, CHECK)
    part_NC = aggregate(partial(by_sample(own), sharp=1.0), *given, CHECK)

    assert seen == [((2, 5, 3), 5)] + [((2, 1, 3), 1)] * 5
    assert torch.equal(whole_NC, part_NC)


def test_a_part_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"'own', which returned a tensor of shape \(1, 3\); allowed: \(5, 3\)"):
        aggregate(by_sample(lambda l_KNC, c_KC, p_N: l_KNC[0, :1]), *answers(2, 5, 3), CHECK)


@needs_peak
@pytest.mark.parametrize("name", sorted(aggregations.names()))
def test_memory_does_not_grow_with_the_clients(name):
    """Stacked, the logits of 400 clients take 160 MB, and a rule several times that."""
    few, many = ([answers(1, 1000, 100)[0][0]] * clients for clients in (4, 400))
    counts_KC, prompted_N = torch.ones(400, 100), torch.zeros(1000, dtype=torch.int64)
    aggregate(aggregations.get(name), few, counts_KC[:4], prompted_N, CHECK)
    forget_peak()
    before = peak()

    aggregate(aggregations.get(name), many, counts_KC, prompted_N, CHECK)

    assert peak() - before < 150e6
