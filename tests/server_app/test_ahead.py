"""Batches made while clients work on the round before, with the real starter model and real clients."""

import time
from functools import partial

import numpy as np
import pytest
import torch

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.failures import RunError
from fedmmkt.common.images import encode_images
from fedmmkt.common.payloads import ClientReport, PayloadError
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.guard import Arms, Evidence, GuardState, Trial
from fedmmkt.server_app.requests import make_requests
from fedmmkt.server_app.strategy import FedMMKT, strategies
from fedmmkt.server_app.t2i.samples import Samples
from tests.conftest import registered

AHEAD = {
    "t2i__generate_ahead": True,
    "min_available_nodes": 1,
    "client__models": "mlp",
    "client__distillation_steps": 1,
    "learn_early": False,  # With it, bytes depend on the clock.
    "t2i__samples_per_round": 20,
    "t2i__adaptation_learning_rate": 0.03,
}


def build(run_config, run_id=1, strategy=FedMMKT):
    with registered(strategies, "tested", strategy):
        return build_strategy(RunConfig.from_flower(run_config | {"strategy": "tested"}), run_id)


def lines_of(strategy):
    lines = strategy.recorder.run_folder.read_metrics()
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def batches_of(strategy):
    """Return the images and prompts of the batches that are kept, by round."""
    return {batch.round: (batch.images.tobytes(), batch.prompts) for batch, _ in strategy.ledger.history}


def states_equal(some, others):
    return all(torch.equal(some[name], others[name]) for name in some)


class Watched(FedMMKT):
    """Keeps the adapter and the pool after each round, and which batches were made."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.states, self.made = {}, []

    def generate(self, server_round, prompts, pool):
        self.made.append(server_round)
        return super().generate(server_round, prompts, pool)

    def configure_train(self, server_round, arrays, config, grid):
        adapter = {name: tensor.clone() for name, tensor in self.generator.adapter.state().items()}
        self.states[server_round - 1] = adapter, list(self.ledger.pool)
        return super().configure_train(server_round, arrays, config, grid)


def test_a_batch_is_made_beside_the_clients_from_the_state_before_their_answers(tiny_run, make_grid):
    run_config = tiny_run(rounds=4, client__pool_rounds=4, **AHEAD)
    strategy = build(run_config, strategy=Watched)

    strategy.start(make_grid(run_config, nodes=1))

    assert strategy.made == [1, 2, 3, 4]  # None for a fifth round.
    made = batches_of(strategy)
    for server_round, after in ((1, 0), (2, 0), (3, 1), (4, 2)):
        adapter, pool = strategy.states[after]
        with strategy.generator.adapter.holding(adapter):
            samples = strategy.generate(server_round, strategy.make_prompts(server_round), pool)
        assert made[server_round] == (encode_images(samples.images_NHWC)[0].tobytes(), samples.prompts)
    assert not states_equal(strategy.states[1][0], strategy.states[2][0])
    timeline = strategy.recorder.run_folder.read_metrics()[2]["seconds"]["timeline"]
    server = {name: times for name, *times in timeline["server"]}
    (third,) = (times for name, *times in timeline["beside"] if name == "generate")
    assert server["clients"][0] <= third[0] < third[1] <= server["aggregate"][0] + 0.001


def test_the_numbers_do_not_depend_on_when_clients_answer(tiny_run, make_grid):
    runs = []
    for name, seconds in (("quick", 0.0), ("slow", 2.0)):
        run_config = tiny_run(name=name, rounds=3, **AHEAD)
        grid = make_grid(run_config, nodes=1)
        push = grid.push_messages
        grid.push_messages = lambda messages, push=push, seconds=seconds: (push(messages), time.sleep(seconds))[0]
        runs.append(build(run_config))
        runs[-1].start(grid)

    quick, slow = runs
    assert lines_of(quick) == lines_of(slow)
    assert states_equal(quick.generator.adapter.state(), slow.generator.adapter.state())


def test_a_frozen_t2i_makes_the_same_batches_ahead(tiny_run, make_grid):
    runs = []
    for name in ("ahead", "after"):
        run_config = tiny_run(
            name=name, rounds=3, t2i__scores="none", **AHEAD | {"t2i__generate_ahead": name == "ahead"}
        )
        runs.append(build(run_config))
        runs[-1].start(make_grid(run_config, nodes=1))

    assert lines_of(runs[0]) == lines_of(runs[1])


class PowerCutError(Exception):
    """The server dies."""


class DiesIn3(FedMMKT):
    def adapt_generator(self, server_round, pool):
        if server_round == 3:
            raise PowerCutError
        return super().adapt_generator(server_round, pool)


@pytest.mark.parametrize("how", ["killed in a round", "done, and given more rounds"])
def test_a_run_that_goes_on_makes_the_same_batches(tiny_run, make_grid, how):
    changes = AHEAD | {"t2i__guard": 0.25, "client__pool_rounds": 4, "t2i__pool_rounds": 1}

    def run(run_id, strategy=FedMMKT, **more):
        run_config = tiny_run(**changes | {"rounds": 4} | more)
        built = build(run_config, run_id, strategy)
        built.start(make_grid(run_config, nodes=1))
        return built

    whole = run(1, name="whole")
    if how == "killed in a round":
        with pytest.raises(PowerCutError):
            run(2, DiesIn3, name="cut")
    else:
        run(2, name="cut", rounds=2)
    resumed = run(3, name="cut", resume_from=tiny_run(name="cut")["output-dir"])

    assert batches_of(whole) == batches_of(resumed)
    assert states_equal(whole.generator.adapter.state(), resumed.generator.adapter.state())
    assert whole.ledger.guard.to_json() == resumed.ledger.guard.to_json()
    if how == "killed in a round":
        assert lines_of(whole)[:4] == lines_of(resumed)[:4]


class FailsIn2(FedMMKT):
    def generate(self, server_round, prompts, pool):
        if server_round == 2:
            raise RunError("no images today")
        return super().generate(server_round, prompts, pool)


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_ends_the_run_in_the_round_of_the_batch(tiny_run, make_grid, ahead):
    run_config = tiny_run(rounds=3, **AHEAD | {"t2i__generate_ahead": ahead})
    strategy = build(run_config, strategy=FailsIn2)

    with pytest.raises(RunError, match=r"^no images today$"):
        strategy.start(make_grid(run_config, nodes=1))

    assert [line["round"] for line in lines_of(strategy)] == [0, 1]


class EndlessIn2(FedMMKT):
    def generate(self, server_round, prompts, pool):
        if server_round == 2:
            progress, self.ended = self.recorder.progress(1000), False
            for done in range(1000):  # Twenty seconds.
                time.sleep(0.02)
                progress(done)
            self.ended = True
        return super().generate(server_round, prompts, pool)

    def read_train_reply(self, reply):
        raise PayloadError("nobody is heard")


def test_a_run_that_fails_does_not_wait_for_the_next_batch(tiny_run, make_grid):
    run_config = tiny_run(rounds=3, **AHEAD)
    strategy = build(run_config, strategy=EndlessIn2)

    with pytest.raises(RunError, match="none of 1 nodes gave a valid reply"):
        strategy.start(make_grid(run_config, nodes=1))

    assert strategy.ended is False


class OwnBatches(Watched):
    """Makes its batches itself, without the step of `FedMMKT`."""

    def configure_train(self, server_round, arrays, config, grid):
        samples = self.generate(server_round, self.make_prompts(server_round), self.ledger.pool)
        batch = self.make_batch(server_round, samples)
        self.ledger.serve(batch, samples)
        instructions = partial(self._instructions, server_round)
        return make_requests(grid.get_node_ids(), self.ledger, instructions, "train", batch)


def test_nothing_is_made_ahead_for_a_strategy_with_a_step_of_its_own(tiny_run, make_grid):
    run_config = tiny_run(rounds=2, **AHEAD)
    strategy = build(run_config, strategy=OwnBatches)

    strategy.start(make_grid(run_config, nodes=1))

    assert strategy.made == [1, 2]


def test_prompts_are_checked_when_the_batch_is_due(tiny_run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a digit"}\n')
    strategy = build(tiny_run(t2i__prompts=str(prompts), **AHEAD))
    private = ClientReport(
        client="a", model="mlp", modality="image", examples=1, accuracy=None, loss=None, epsilon=1.0, budget=1.0,
        delta=1e-5,
    )  # fmt: skip
    strategy.ahead.begin(1)
    strategy.recorder._background.wait()

    with pytest.raises(ConfigError, match="20 of 20 prompts name no class, and no client sends logits"):
        strategy.ahead.batch(1, [private])


def test_a_batch_made_ahead_is_for_its_round_alone(tiny_run):
    strategy = build(tiny_run(rounds=3, **AHEAD), strategy=Watched)
    strategy.ahead.begin(2)
    strategy.recorder._background.wait()

    assert strategy.ahead.batch(3, []).batch.round == 3  # Made now.
    assert strategy.made == [2, 3]


def test_a_late_answer_does_not_change_what_a_batch_is_made_from(tiny_run):
    strategy = build(tiny_run(rounds=3, **AHEAD))
    samples = strategy.generate(1, strategy.make_prompts(1), [])
    before, after = (samples.scored(torch.full((20,), score)) for score in (1.0, 2.0))
    strategy.ledger.pool = [before]
    strategy.ahead.begin(2)

    strategy.ledger.pool[-1] = after  # As `teach_again` does.

    assert strategy.ledger.made_from.pool == (before,)


# ---------------------------------------------------------------------- the guard


@pytest.fixture
def guarded(tiny_run):
    """Return a strategy with two challengers: the one that made a batch, and what it has learned since."""
    strategy = build(tiny_run(t2i__guard=0.25, **AHEAD))
    tested = {name: tensor + 0.1 for name, tensor in strategy.generator.adapter.state().items()}
    newer = {name: tensor + 0.1 for name, tensor in tested.items()}
    latents = torch.arange(4.0).view(4, 1, 1, 1)
    samples = Samples(("a",) * 4, torch.zeros(4, dtype=torch.int64), np.zeros((4, 0, 0, 3), np.uint8), latents)
    strategy.ledger.pool = [samples.scored(torch.ones(4))]
    strategy.ledger.arms = Arms(torch.tensor([True, True, False, True]), tested, 5, torch.zeros(4, dtype=torch.bool))
    return strategy, tested, newer


def judge(strategy):
    return strategy.guard.judge([], torch.zeros(4, dtype=torch.int64), None)


def test_the_challenger_that_made_the_batch_is_accepted_and_what_it_learned_since_is_the_next(guarded):
    strategy, tested, newer = guarded
    strategy.ledger.guard = GuardState(Trial(newer, {"votes": Evidence(3.0, 1.0)}), 0.5, number=5)

    verdict = judge(strategy)

    told = {"rounds": 1, "step": 1.0, "base_share": 0.5}
    assert verdict == {"verdict": "accepted", "preference": {"votes": 3.0}} | told
    assert states_equal(strategy.generator.adapter.state(), tested)
    guard = strategy.ledger.guard
    assert guard.trial.challenger is newer
    assert (guard.trial.made, guard.trial.evidence, guard.number) == ((), {}, 6)


def test_a_challenger_that_is_taken_back_takes_along_what_it_learned_since(guarded):
    strategy, _, newer = guarded
    before = {name: tensor.clone() for name, tensor in strategy.generator.adapter.state().items()}
    strategy.ledger.guard = GuardState(Trial(newer, {"votes": Evidence(-3.0, 1.0)}), number=5)

    assert judge(strategy)["verdict"] == "taken back"

    assert states_equal(strategy.generator.adapter.state(), before)
    assert strategy.ledger.guard == GuardState(None, 0.5, False, 6)
    assert strategy.ledger.pool[0].latents_NCHW.flatten().tolist() == [2.0]


@pytest.mark.parametrize(("trusted", "left"), [(True, [0.0, 1.0, 2.0, 3.0]), (False, [2.0])])
def test_a_batch_that_comes_after_the_end_of_its_trial_decides_nothing(guarded, trusted, left):
    strategy, _, newer = guarded
    state = strategy.ledger.guard = GuardState(Trial(newer, {"votes": Evidence(3.0, 1.0)}), 1.0, trusted, number=6)

    assert judge(strategy) is None

    assert strategy.ledger.guard is state
    assert strategy.ledger.pool[0].latents_NCHW.flatten().tolist() == left  # Not what a refused challenger made.


def test_a_challenger_is_compared_from_the_second_round_after_its_update_on(tiny_run, make_grid):
    run_config = tiny_run(rounds=4, **AHEAD | {"t2i__guard": 0.25})
    strategy = build(run_config)

    strategy.start(make_grid(run_config, nodes=1))

    # Updated in round 1, it makes a part of batch 3, which is made while clients work on batch 2.
    assert ["guard" in line for line in lines_of(strategy)][:4] == [False, False, False, True]
