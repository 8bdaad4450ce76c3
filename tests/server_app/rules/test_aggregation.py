"""Aggregation rules against values computed by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmmkt.common.config import ConfigError
from fedmmkt.server_app.rules.aggregation import aggregations


def logits(*clients):
    return torch.tensor(clients, dtype=torch.float64).log()


NO_PROMPT = torch.tensor([-1])


def test_mask_lets_clients_vote_on_their_classes_by_number_of_examples():
    # One sample; client 0 holds 30 of class 0 and 10 of class 1, client 1 holds 10 of class 1 only.
    logits_KNC = logits([[0.6, 0.4, 1e-9]], [[0.1, 0.9, 1e-9]])
    counts_KC = torch.tensor([[30, 10, 0], [0, 10, 0]])

    probabilities_NC = aggregations.get("mask")(logits_KNC, counts_KC, NO_PROMPT)

    # q(0) = 0.6, q(1) = (10 * 0.4 + 10 * 0.9) / 20 = 0.65, q(2) = 0.
    assert probabilities_NC[0].tolist() == pytest.approx([0.6 / 1.25, 0.65 / 1.25, 0.0])


def test_mask_is_uniform_where_nobody_covers_what_it_sees():
    probabilities_NC = aggregations.get("mask")(torch.tensor([[[0.0, -1e4]]]), torch.tensor([[0, 5]]), NO_PROMPT)
    assert probabilities_NC[0].tolist() == [0.5, 0.5]


def test_mean_averages_probabilities():
    probabilities_NC = aggregations.get("mean")(logits([[0.8, 0.2]], [[0.4, 0.6]]), torch.ones(2, 2), NO_PROMPT)
    assert probabilities_NC[0].tolist() == pytest.approx([0.6, 0.4])


def test_entropy_trusts_the_certain_client_more():
    sure, unsure = [0.99, 0.01], [0.5, 0.5]
    probabilities_NC = aggregations.get("entropy")(logits([sure], [unsure]), torch.ones(2, 2), NO_PROMPT)
    # Entropies 0.0560 and 0.6931; weights exp(-H): 0.9455 and 0.5, normalised 0.6541 and 0.3459.
    assert probabilities_NC[0, 0].item() == pytest.approx(0.6541 * 0.99 + 0.3459 * 0.5, abs=1e-3)


def test_energy_trusts_the_client_with_larger_logits():
    logits_KNC = torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]])
    probabilities_NC = aggregations.get("energy")(logits_KNC, torch.ones(2, 2), NO_PROMPT)
    # logsumexp 3.0486 and 0.6931: weights 0.9134 and 0.0866; softmax 0.9526 and 0.5.
    assert probabilities_NC[0, 0].item() == pytest.approx(0.9134 * 0.9526 + 0.0866 * 0.5, abs=1e-3)


def test_era_sharpens_the_mean():
    probabilities_NC = aggregations.get("era")(logits([[0.6, 0.4]]), torch.ones(1, 2), NO_PROMPT)
    # softmax(6, 4) = 1 / (1 + e^-2).
    assert probabilities_NC[0, 0].item() == pytest.approx(0.8808, abs=1e-4)


def test_median_resists_one_liar():
    honest, liar = [0.9, 0.1], [0.0001, 0.9999]
    probabilities_NC = aggregations.get("median")(logits([honest], [honest], [liar]), torch.ones(3, 2), NO_PROMPT)
    assert probabilities_NC[0].tolist() == pytest.approx(honest)


def test_min_ce_takes_the_client_that_fits_the_prompt_best():
    logits_KNC = logits([[0.7, 0.3], [0.5, 0.5]], [[0.2, 0.8], [0.9, 0.1]])
    probabilities_NC = aggregations.get("min-ce")(logits_KNC, torch.ones(2, 2), torch.tensor([0, -1]))
    # Sample 0 is prompted class 0: client 0. Sample 1 has no class: client 1 has the lower entropy.
    assert probabilities_NC.flatten().tolist() == pytest.approx([0.7, 0.3, 0.9, 0.1])


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(0, 2**31 - 1),
    st.sampled_from(sorted(aggregations.names())),
)
def test_every_rule_gives_distributions_whatever_the_order_of_clients(clients, samples, classes, seed, name):
    generator = torch.Generator().manual_seed(seed)
    logits_KNC = torch.randn(clients, samples, classes, generator=generator, dtype=torch.float64) * 5
    counts_KC = torch.randint(0, 20, (clients, classes), generator=generator)
    prompted_N = torch.randint(-1, classes, (samples,), generator=generator)
    order = torch.randperm(clients, generator=generator)

    first_NC = aggregations.get(name)(logits_KNC, counts_KC, prompted_N)
    second_NC = aggregations.get(name)(logits_KNC[order], counts_KC[order], prompted_N)

    assert torch.allclose(first_NC.sum(1), torch.ones(samples, dtype=torch.float64))
    assert (first_NC >= 0).all()
    assert torch.allclose(first_NC, second_NC)


def test_a_registered_rule_is_found_and_an_unknown_one_is_refused():
    @aggregations.register("first-client")
    def first_client(logits_KNC, class_counts_KC, prompted_N):
        return logits_KNC[0].softmax(-1)

    try:
        assert aggregations.get("first-client") is first_client
    finally:
        aggregations.unregister("first-client")
    problem = "but no aggregation rule is registered under that name; allowed: energy, entropy"
    with pytest.raises(ConfigError, match=f"'t2i.aggregation' is 'first-client', {problem}"):
        aggregations.get("first-client")
