"""Going on with a run that was cut off, and clients that come and go."""

import json
import shutil

import pytest
import torch

from client_app import app as client_app
from common.config import ConfigError, RunConfig
from server_app.app import build_strategy
from server_app.checkpoint import checkpoints, read_checkpoint
from server_app.strategy import FedMMKT


class PowerCutError(Exception):
    """The server dies."""


class Dying(FedMMKT):
    """Dies in round 2, when all clients have answered and learned."""

    def adapt_generator(self, server_round, generated, scores_N):
        if server_round == 2:
            raise PowerCutError
        return super().adapt_generator(server_round, generated, scores_N)


def start(run_config, grid, run_id, strategy=FedMMKT):
    built = build_strategy(RunConfig.from_flower(run_config), run_id, strategy)
    built.start(grid)
    return built


def without_seconds(strategy):
    return [
        {key: value for key, value in line.items() if key != "seconds"} for line in strategy.run_folder.read_metrics()
    ]


def same_adapter(one, other):
    states = one.generator.adapter_state(), other.generator.adapter_state()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture
def cut(tiny_run, make_grid):
    """Run three rounds at once, and again with the power cut in round 2; return the whole run and what was left."""
    changes = {"rounds": 3, "client__models": "mlp,text,dual", "client__balanced_softmax": True}
    whole_config = tiny_run(name="whole", **changes)
    whole = start(whole_config, make_grid(whole_config, nodes=3), 1)
    cut_config = tiny_run(name="cut", **changes)
    with pytest.raises(PowerCutError):
        start(cut_config, make_grid(cut_config, nodes=3), 2, Dying)
    return whole, cut_config | {"resume-from": cut_config["output-dir"]}


def test_a_resumed_run_equals_the_uninterrupted_one(cut, make_grid, tmp_path):
    whole, run_config = cut
    # In a folder of its own first, then in that of the run that was cut off: neither run spoils the other.
    elsewhere = run_config | {"output-dir": str(tmp_path / "elsewhere")}
    for number, resumed_config in enumerate((elsewhere, run_config), start=3):
        resumed = start(resumed_config, make_grid(resumed_config, nodes=3), number)
        assert without_seconds(resumed) == without_seconds(whole)
        assert same_adapter(resumed, whole)
        for round_ in range(4):
            picture = f"images/round-{round_:03d}.png"
            assert (resumed.run_folder.path / picture).read_bytes() == (whole.run_folder.path / picture).read_bytes()
    described = resumed.run_folder.read_config()
    assert described["resumed"] == {"run": f"{2:020d}", "after-round": 1}


def test_a_damaged_checkpoint_falls_back_to_the_one_before(cut, make_grid, caplog):
    whole, run_config = cut
    last = checkpoints(whole.run_folder.checkpoints)[-1]
    config = run_config | {"resume-from": str(whole.run_folder.path), "output-dir": run_config["output-dir"] + "-2",
                           "client.state-dir": run_config["client.state-dir"].replace("cut", "whole")}  # fmt: skip
    content = bytearray((last / "tensors.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (last / "tensors.safetensors").write_bytes(content)

    resumed = start(config, make_grid(config, nodes=3), 5)

    assert "tensors.safetensors is not what was written (its SHA-256 is another)" in caplog.text
    assert resumed.run_folder.read_config()["resumed"]["after-round"] == 2
    assert without_seconds(resumed) == without_seconds(whole)
    assert same_adapter(resumed, whole)


def test_more_rounds_go_on_with_a_run_that_is_done(tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="mlp")
    start(run_config, make_grid(run_config, nodes=2), 1)
    more = run_config | {"rounds": 2, "resume-from": run_config["output-dir"]}
    resumed = start(more, make_grid(more, nodes=2), 2)
    assert [line["round"] for line in resumed.run_folder.read_metrics()] == [0, 1, 2]
    again = start(more, make_grid(more, nodes=2), 3)  # Nothing is left to do.
    assert again.run_folder.read_metrics() == resumed.run_folder.read_metrics()


def test_the_rounds_that_start_is_told_are_in_the_configuration(tiny_run, make_grid):
    run_config = tiny_run(client__models="mlp")
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(make_grid(run_config, nodes=2), num_rounds=1)
    assert json.loads(strategy.run_folder.config.read_text())["config"]["rounds"] == 1


def test_what_cannot_be_resumed_is_named(tiny_run, make_grid, tmp_path):
    run_config = tiny_run(rounds=1, client__models="mlp")
    done = start(run_config, make_grid(run_config, nodes=2), 1)
    resumed = run_config | {"resume-from": run_config["output-dir"], "output-dir": str(tmp_path / "new")}

    def error(**changes):
        with pytest.raises(ConfigError) as caught:
            build_strategy(RunConfig.from_flower(resumed | changes), 2)
        return str(caught.value)

    assert "a run of another kind: seed was 0 and is 1" in error(seed=1)
    assert "data.alpha was 0.1 and is 0.5" in error(**{"data.alpha": 0.5})
    assert "t2i.lora-rank was 8 and is 4" in error(**{"t2i.lora-rank": 4})
    assert "'/no/such/run', which holds no checkpoint that can be read" in error(**{"resume-from": "/no/such/run"})
    assert "resume-from is 'runs/demo'; allowed: an absolute path" in error(**{"resume-from": "runs/demo"})
    for checkpoint in checkpoints(done.run_folder.checkpoints):
        (checkpoint / "manifest.json").unlink()
    assert "holds no checkpoint that can be read (" in error()
    assert not (tmp_path / "new").exists()


def test_the_last_checkpoints_alone_are_kept_and_whole(tiny_run, make_grid):
    run_config = tiny_run(rounds=3, client__models="mlp", checkpoints_kept=2)
    strategy = start(run_config, make_grid(run_config, nodes=2), 1)
    kept = checkpoints(strategy.run_folder.checkpoints)
    assert [path.name for path in kept] == ["round-00002", "round-00003"]
    state = read_checkpoint(kept[-1])
    assert state.metrics == strategy.run_folder.read_metrics()
    assert state.clients == ("mlp-0", "mlp-1")
    assert all(torch.equal(tensor, state.adapter[name]) for name, tensor in strategy.generator.adapter_state().items())


def test_two_runs_do_not_write_in_one_folder(tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="mlp")
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    with strategy.run_folder.in_use(), pytest.raises(ConfigError, match=r"is being written by a run that is going on"):
        strategy.start(make_grid(run_config, nodes=2))


# ---------------------------------------------------------------------- clients that come and go


def test_nodes_join_leave_return_and_lose_their_disk(tiny_run, make_grid):
    """Text joins in round 3 with a modality that was not there; mlp-0 is away in rounds 2 and 3 and loses its disk."""
    run_config = tiny_run(rounds=5, client__models="mlp,mlp,text", min_nodes=1)
    grid = make_grid(run_config, nodes=3)

    nodes = dict(grid.contexts)
    connected = {1: {1, 2}, 2: {2}, 3: {2, 3}, 4: {1, 2, 3}, 5: {1, 2, 3}}

    class Changing(FedMMKT):
        def configure_train(self, server_round, arrays, config, grid):
            grid.contexts = {node_id: nodes[node_id] for node_id in connected[server_round]}
            return super().configure_train(server_round, arrays, config, grid)

    del grid.contexts[3]
    strategy = build_strategy(RunConfig.from_flower(run_config), 1, Changing)
    receive = client_app.Client.receive
    held = {}

    def watch(self, request):
        if self.name == "mlp-0" and self.instructions.round == 4:
            shutil.rmtree(self.memory.folder)
            self.memory.folder.mkdir()
        receive(self, request)
        held[self.instructions.round, self.name] = len(self.memory.batches())

    client_app.Client.receive = watch
    try:
        strategy.start(grid)
    finally:
        client_app.Client.receive = receive

    lines = strategy.run_folder.read_metrics()
    assert [line["replies"]["answered"] for line in lines[1:]] == [
        ["mlp-0", "mlp-1"], ["mlp-1"], ["mlp-1", "text-2"], ["mlp-0", "mlp-1", "text-2"], ["mlp-0", "mlp-1", "text-2"],
    ]  # fmt: skip
    assert [line["replies"]["gone"] for line in lines[1:]] == [[], ["mlp-0"], ["mlp-0"], [], []]
    assert lines[3]["replies"]["asked"] == ["mlp-1", "text-2"]
    assert held[3, "text-2"] == 3  # The round's batch, and the two that it has missed.
    assert held[5, "mlp-0"] == 4  # All that are drawn from, and the round's.
    assert set(lines[-1]["clients"]["by_modality"]) == {"image", "text"}


def test_a_late_reply_is_named_and_not_counted(tiny_run, make_grid):
    """A node whose reply to round 1 comes in round 2."""
    run_config = tiny_run(rounds=2, client__models="mlp", round_deadline=0.01, quorum=0.5, min_nodes=1)
    grid = make_grid(run_config, nodes=2)
    pull, push, held = grid.pull_messages, grid.push_messages, set()

    def slow_push(messages):
        messages = list(messages)
        ids = push(messages)
        for message_id, message in zip(ids, messages, strict=True):
            instructions = message.content["instructions"]
            if instructions["round"] == 1 and message.metadata.dst_node_id == 2:
                held.add(message_id)
            elif instructions["round"] == 2:
                held.clear()
        return ids

    grid.push_messages = slow_push
    grid.pull_messages = lambda ids: pull([message_id for message_id in ids if message_id not in held])
    strategy = start(run_config, grid, 1)

    lines = strategy.run_folder.read_metrics()
    assert lines[1]["replies"]["answered"] == ["mlp-0"]
    assert lines[1]["replies"]["reasons"] == {"mlp-1": "no answer before the round closed"}
    assert lines[2]["replies"]["late"] == ["mlp-1"]
    assert lines[2]["replies"]["received"] == 2
