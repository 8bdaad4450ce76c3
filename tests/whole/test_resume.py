"""Going on with a run that was cut off, and clients that come and go."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmmkt.common.config import ConfigError, RunConfig, to_flower
from fedmmkt.deploy.command import run_command
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.deploy.run_checks import check_run
from fedmmkt.deploy.run_config_text import parse_run_config
from fedmmkt.deploy.settings import earlier_nodes, effective_config
from fedmmkt.deploy.submission import COMPLETED
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.record.checkpoint import checkpoints, read_checkpoint
from fedmmkt.server_app.record.resuming import kept_metrics
from fedmmkt.server_app.strategy import FedMMKT, strategies
from tests import ROOT
from tests.conftest import TINY, registered


class PowerCutError(Exception):
    """The server dies."""


class Joined(FedMMKT):
    """Node 4 is there from round 3 on; on demand the server dies when all clients of a round have answered."""

    dies_in = 0

    def configure_train(self, server_round, arrays, config, grid):
        grid.contexts = {node_id: grid.nodes[node_id] for node_id in ((1, 2, 3, 4) if server_round > 2 else (1, 2, 3))}
        return super().configure_train(server_round, arrays, config, grid)

    def adapt_generator(self, server_round, pool):
        if server_round == self.dies_in:
            raise PowerCutError
        return super().adapt_generator(server_round, pool)


class DiesIn3(Joined):
    dies_in = 3


class DiesIn4(Joined):
    dies_in = 4


def build(run_config, run_id, strategy=FedMMKT):
    """Build a strategy, which the configuration names alike whichever it is."""
    with registered(strategies, "tested", strategy):
        return build_strategy(RunConfig.from_flower(run_config | {"strategy": "tested"}), run_id)


def start(run_config, grid, run_id, strategy=FedMMKT):
    built = build(run_config, run_id, strategy)
    built.start(grid)
    return built


def start_joined(run_config, run_id, strategy, connected=3):
    node_configs = [{"partition-id": index, "num-partitions": 4} for index in range(4)]
    grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, node_configs)
    grid.nodes = dict(grid.contexts)
    for node_id in range(connected + 1, 5):
        del grid.contexts[node_id]
    return start(run_config, grid, run_id, strategy)


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_equal(resumed, whole):
    lines, others = (without_seconds(strategy.recorder.run_folder.read_metrics()) for strategy in (resumed, whole))
    moved = [(line.pop("bytes"), other.pop("bytes")) for line, other in zip(lines, others, strict=True)]
    assert lines == others
    if not whole.recorder.config.learn_early:  # Else a request brings again what nobody has said by then that it holds.
        # A node that was not there when the run went on is told once of what run: its key, in quotes, and the round.
        assert [one["down"] - other["down"] for one, other in moved] == [0, 0, 0, len('"00000000000000000002"2'), 0]
        assert [one["up"] - other["up"] for one, other in moved] == [0] * 5
    adapters = [strategy.generator.adapter.state() for strategy in (resumed, whole)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    pictures = [strategy.recorder.run_folder.pictures().values() for strategy in (resumed, whole)]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    assert len(pictures[0]) == 5


@pytest.fixture(scope="module", params=[True, False], ids=["early", "not early"])
def runs(tmp_path_factory, request):
    """Run four rounds at once, and again with a power cut in round 3; return the whole run and the other's settings."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"rounds": 4, "client.models": "mlp,text,dual,mlp", "client.pool-rounds": 1}
    changes |= {"learn-early": request.param}
    run_config = to_flower(RunConfig()) | TINY | changes  # Clients keep their memory in the folder of the run.
    whole = start_joined(run_config | {"output-dir": str(folder / "whole")}, 1, Joined)
    cut = run_config | {"output-dir": str(folder / "cut")}
    with pytest.raises(PowerCutError):
        start_joined(cut, 2, DiesIn3)
    return whole, cut | {"resume-from": cut["output-dir"]}


def test_a_run_that_is_cut_off_twice_equals_the_uninterrupted_one(runs, tmp_path):
    """In a folder of its own first, then in that of the run that was cut off."""
    whole, run_config = runs
    elsewhere = run_config | {"output-dir": str(tmp_path / "elsewhere")}
    with pytest.raises(PowerCutError):
        start_joined(elsewhere, 3, DiesIn4)
    again = elsewhere | {"resume-from": elsewhere["output-dir"]}

    resumed = start_joined(again, 4, Joined, connected=4)

    assert_equal(resumed, whole)
    assert resumed.recorder.run_folder.read_config()["resumed"] == {"run": f"{3:020d}", "after-round": 3}


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(runs, tmp_path, caplog, file):
    whole, run_config = runs
    folder = shutil.copytree(run_config["resume-from"], tmp_path / "damaged")
    last = checkpoints(folder / "checkpoints")[-1]
    content = bytearray((last / file).read_bytes())
    content[len(content) // 2] ^= 1
    (last / file).write_bytes(content)
    run_config = run_config | {"resume-from": str(folder), "output-dir": str(folder)}

    if file == "state.json":
        build(run_config, 5)
        assert [path.name for path in checkpoints(folder / "checkpoints")] == ["round-00001"]
    else:
        resumed = start_joined(run_config, 5, Joined)
        assert resumed.recorder.run_folder.read_config()["resumed"]["after-round"] == 1
        # Node 4 is told of another round, of as many digits.
        assert_equal(resumed, whole)
    assert f"{last / file} is not what was written (its SHA-256 is another)" in caplog.text


def test_more_rounds_go_on_with_a_run_that_is_done_as_if_it_had_them_from_the_start(tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="mlp", learn_early=False)  # With it, bytes depend on the clock.
    start(run_config, make_grid(run_config, nodes=2), 1)
    more = run_config | {"rounds": 2, "resume-from": run_config["output-dir"]}
    resumed = start(more, make_grid(more, nodes=2), 2)
    whole_config = tiny_run(name="whole", rounds=2, client__models="mlp", learn_early=False)
    whole = start(whole_config, make_grid(whole_config, nodes=2), 3)

    lines, others = (without_seconds(strategy.recorder.run_folder.read_metrics()) for strategy in (resumed, whole))
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert (lines[0], lines[2]) == (others[0], others[2])
    # The round that was the last holds what its last message brought, which the longer run does not send.
    assert {key for key in lines[1] if lines[1][key] != others[1].get(key)} == {"clients", "bytes", "evaluation"}
    adapters = [strategy.generator.adapter.state() for strategy in (resumed, whole)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())

    again = start(more, make_grid(more, nodes=2), 4)  # Nothing is left to do.
    assert again.recorder.run_folder.read_metrics() == resumed.recorder.run_folder.read_metrics()


def test_a_round_that_was_cut_off_while_it_was_measured_is_measured_when_the_run_goes_on(tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="mlp", judge=True)
    cut = start(run_config, make_grid(run_config, nodes=2), 1).recorder.run_folder
    whole, picture = without_seconds(cut.read_metrics()), cut.picture(1).read_bytes()
    half = cut.metrics.read_bytes()[:-9]
    cut.metrics.write_bytes(half)
    cut.picture(1).unlink()

    again = run_config | {"resume-from": run_config["output-dir"]}
    resumed = start(again, make_grid(again, nodes=2), 2).recorder.run_folder

    assert without_seconds(resumed.read_metrics()) == whole
    assert whole[1]["generator"]["frechet"] > 0
    assert resumed.picture(1).read_bytes() == picture


def test_a_full_disk_beside_the_clients_ends_the_run_and_leaves_its_checkpoint(tiny_run, make_grid, monkeypatch):
    run_config = tiny_run(rounds=2, client__models="mlp")
    strategy = build(run_config, 1)
    run, append = strategy.recorder.run_folder, strategy.recorder.run_folder.append_metrics

    def append_until_full(line):
        if line["round"] == 1:
            raise OSError(28, "metrics.jsonl could not be written (No space left on device)")
        append(line)

    monkeypatch.setattr(run, "append_metrics", append_until_full)
    with pytest.raises(OSError, match="No space left on device"):
        strategy.start(make_grid(run_config, nodes=2))

    assert [line["round"] for line in run.read_metrics()] == [0]
    assert [path.name for path in checkpoints(run.checkpoints)] == ["round-00000", "round-00001"]


def test_a_client_that_lost_its_disk_while_the_run_was_down_is_named_and_begins_anew(tiny_run, make_grid, caplog):
    run_config = tiny_run(rounds=1, client__models="mlp")
    start(run_config, make_grid(run_config, nodes=2), 1)
    shutil.rmtree(Path(run_config["client.state-dir"]) / f"{1:020d}" / "mlp-1")
    more = run_config | {"rounds": 2, "resume-from": run_config["output-dir"]}

    resumed = start(more, make_grid(more, nodes=2), 2)

    assert "mlp-1 holds nothing of the earlier run, and begins anew" in caplog.text
    assert "mlp-0 holds nothing" not in caplog.text
    assert resumed.recorder.run_folder.read_metrics()[2]["replies"]["answered"] == ["mlp-0", "mlp-1"]


def test_the_rounds_that_start_is_told_are_in_the_configuration(tiny_run, make_grid):
    run_config = tiny_run(client__models="mlp")
    strategy = build(run_config, 1)
    strategy.start(make_grid(run_config, nodes=2), num_rounds=1)
    assert json.loads(strategy.recorder.run_folder.config.read_text())["config"]["rounds"] == 1


def test_a_resumed_run_takes_the_settings_of_the_earlier_one(tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="mlp,cnn", data__alpha=0.7, extra__mine=1.5)
    start(run_config, make_grid(run_config, nodes=2), 1)
    folder = Path(run_config["output-dir"])
    earlier = json.loads((folder / "config.json").read_text())["config"]
    strategy = {"strategy": "fedmmkt"}  # these tests have one of their own
    (folder / "config.json").write_text(json.dumps({"config": earlier | strategy | {"of-old": 1}}))
    typed = {"resume-from": str(folder), "rounds": 2}

    complete = {**to_flower(RunConfig()), **effective_config(ROOT, 2, folder.parent / "new", typed)}
    config = RunConfig.from_flower(complete).model_dump(mode="json", by_alias=True)

    own = {"rounds": 2, "output-dir": str(folder.parent / "new"), "resume-from": str(folder), "min-available-nodes": 2}
    assert config == earlier | strategy | own
    assert earlier_nodes(folder) == 2
    check_run(ROOT, 2, effective_config(ROOT, 2, folder.parent / "new", typed))  # finds nothing wrong
    with pytest.raises(ConfigError) as caught:  # what differs is told before anything starts, with what to type
        check_run(ROOT, 2, effective_config(ROOT, 2, folder.parent / "new", typed | {"data.alpha": 0.5}))
    assert "a run of another configuration: 'data.alpha' was 0.7 and is 0.5; allowed" in str(caught.value)
    with pytest.raises(ConfigError, match=r"--nodes is 3, and the run .* has 2 nodes; .* allowed: --nodes 2,"):
        check_run(ROOT, 3, effective_config(ROOT, 3, folder.parent / "new", typed))
    (option,) = [shlex.split(text)[1] for text in str(caught.value).split("its values: ")[1:]]
    assert {**to_flower(RunConfig()), **parse_run_config([option])} == complete


def test_a_resumed_run_goes_on_in_its_folder_and_one_that_is_done_is_refused(tiny_run, make_grid, capsys):
    run_config = tiny_run(rounds=1, client__models="mlp")
    folder = start(run_config, make_grid(run_config, nodes=2), 1).recorder.run_folder
    described = json.loads(folder.config.read_text())
    folder.config.write_text(json.dumps({"config": described["config"] | {"strategy": "fedmmkt"}}))
    given, resumed = [], f'resume-from="{folder.path}"'

    def run(*arguments):
        def runner(*those):
            given.append(those)
            return COMPLETED

        options = [text for argument in arguments for text in ("--run-config", argument)]
        return run_command("demo", "", 6, Path("runs/demo"), runner, ["--app", str(ROOT), *options])

    done, more = run(resumed), run(resumed, "rounds=2")

    assert (done, more) == (2, 0)
    assert "'rounds' is 1, and the run that resume-from names has done 1 rounds; allowed: more than 1" in (
        capsys.readouterr().err
    )
    ((_, nodes, out, _),) = given
    assert (nodes, out) == (2, folder.path)


def test_what_cannot_be_resumed_is_named(tiny_run, make_grid, tmp_path):
    run_config = tiny_run(rounds=1, client__models="mlp")
    done = start(run_config, make_grid(run_config, nodes=2), 1)
    resumed = run_config | {"resume-from": run_config["output-dir"], "output-dir": str(tmp_path / "new")}

    def error(**changes):
        with pytest.raises(ConfigError) as caught:
            build(resumed | changes, 2)
        return str(caught.value)

    assert "a run of another configuration: 'seed' was 0 and is 1; allowed: the values that it had" in error(seed=1)
    both = error(**{"client.learning-rate": 0.5, "t2i.guidance": "2"})
    assert "'client.learning-rate' was 0.001 and is 0.5; 't2i.guidance' was '1.5,1.0' and is '2.0'" in both
    names = "zero,one,two,three,four,five,six,seven,eight,nine"
    assert "'data.classes' was ''" in error(**{"data.classes": names})
    assert "'/no/such/run', which is not there; allowed: the folder of a run" in error(
        **{"resume-from": "/no/such/run"}
    )
    assert "resume-from is 'runs/demo'; allowed: an absolute path" in error(**{"resume-from": "runs/demo"})
    for checkpoint in checkpoints(done.recorder.run_folder.checkpoints):
        (checkpoint / "manifest.json").unlink()
    assert "holds no checkpoint that can be read (" in error()
    assert not (tmp_path / "new").exists()


def test_the_last_checkpoints_alone_are_kept_and_whole(tiny_run, make_grid):
    run_config = tiny_run(rounds=3, client__models="mlp", checkpoints_kept=2)
    strategy = start(run_config, make_grid(run_config, nodes=2), 1)
    kept = checkpoints(strategy.recorder.run_folder.checkpoints)
    assert [path.name for path in kept] == ["round-00002", "round-00003"]
    state = read_checkpoint(kept[-1])
    run = strategy.recorder.run_folder
    assert kept_metrics(run, state) == (run.metrics.stat().st_size, True)
    assert state.line["clients"] == run.read_metrics()[-1]["clients"]
    assert state.clients == ("mlp-0", "mlp-1")
    assert all(torch.equal(tensor, state.adapter[name]) for name, tensor in strategy.generator.adapter.state().items())


def test_two_runs_do_not_write_in_one_folder(tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="mlp")
    strategy = build(run_config, 1)
    with (
        strategy.recorder.run_folder.in_use(),
        pytest.raises(ConfigError, match=r"is being written by a run that is going on"),
    ):
        strategy.start(make_grid(run_config, nodes=2))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """In a process of its own, files may grow to 64 kB: writing the second checkpoint fails as on a full disk."""
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from fedmmkt.server_app.record.checkpoint import Checkpoints, ServerState\n"
        "from fedmmkt.server_app.record.run_folder import Mark\n"
        "def state(number):\n"
        "    adapter = {'lora': torch.full((100_000,), float(number))}\n"
        "    return ServerState(number, 'run', (), {}, ('a', 'b'), (), {}, adapter, [], [], {}, Mark(0, ''))\n"
        "written = Checkpoints(Path(sys.argv[1]), 2)\n"
        "written.write(state(1))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "written.write(state(2))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "could not be written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["round-00001"]
    assert read_checkpoint(tmp_path / "round-00001").adapter["lora"][0] == 1.0


# ---------------------------------------------------------------------- clients that come and go


def test_nodes_join_leave_return_and_lose_their_disk(tiny_run, make_grid, caplog):
    """Text joins in round 3 with a modality that was not there; mlp-0 is away in rounds 2 and 3 and loses its disk."""
    run_config = tiny_run(rounds=5, client__models="mlp,mlp,text", min_available_nodes=1, checkpoints_kept=10)
    grid = make_grid(run_config, nodes=3)
    nodes, memory = dict(grid.contexts), Path(run_config["client.state-dir"]) / f"{1:020d}"
    connected = {1: {1, 2}, 2: {2}, 3: {2, 3}, 4: {1, 2, 3}, 5: {1, 2, 3}}

    class Changing(FedMMKT):
        def configure_train(self, server_round, arrays, config, grid):
            grid.contexts = {node_id: nodes[node_id] for node_id in connected[server_round]}
            if server_round == 4:
                shutil.rmtree(memory / "mlp-0")
            return super().configure_train(server_round, arrays, config, grid)

    del grid.contexts[3]
    strategy = start(run_config, grid, 1, Changing)

    lines = strategy.recorder.run_folder.read_metrics()
    two, three = ["mlp-0", "mlp-1"], ["mlp-0", "mlp-1", "text-2"]
    answered = [line["replies"]["answered"] for line in lines]
    assert answered == [two, two, ["mlp-1"], ["mlp-1", "text-2"], three, three]
    assert [line["replies"]["gone"] for line in lines[1:]] == [[], ["mlp-0"], ["mlp-0"], [], []]
    assert lines[3]["replies"]["asked"] == ["mlp-1", "text-2"]
    assert "2 asked, 2 answered; gone: mlp-0" in caplog.text
    assert set(lines[-1]["clients"]["by_modality"]) == {"image", "text"}
    # The round's batch, and those that the client had missed, from which it learned at once.
    names = {path.name for path in (memory / "text-2" / "round-00003").glob("*.npz")}
    assert names == {"batch-00001.npz", "batch-00002.npz", "batch-00003.npz", "targets-00001.npz", "targets-00002.npz"}
    names = {path.name for path in (memory / "mlp-0" / "round-00005").glob("*.npz")}
    assert names == {f"batch-{n:05d}.npz" for n in (2, 3, 4, 5)} | {f"targets-{n:05d}.npz" for n in (2, 3, 4)}


def test_a_late_reply_is_named_and_counts_while_its_batch_is_taught(tiny_run, make_grid):
    """A node whose reply to round 1 comes in round 2, and which is then asked for round 2."""
    run_config = tiny_run(rounds=2, client__models="mlp", round_deadline=0.01, quorum=0.5, min_available_nodes=1)
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

    class Watching(FedMMKT):
        def make_targets(self, batch, answers):
            taught_again[batch.round] = answers
            return super().make_targets(batch, answers)

    taught_again = {}
    grid.push_messages = slow_push
    grid.pull_messages = lambda ids: pull([message_id for message_id in ids if message_id not in held])
    strategy = start(run_config, grid, 1, Watching)

    lines = strategy.recorder.run_folder.read_metrics()
    assert lines[1]["replies"]["answered"] == ["mlp-0"]
    assert lines[1]["replies"]["reasons"] == {"mlp-1": "no answer before the round closed"}
    assert lines[2]["replies"]["late"] == lines[2]["replies"]["late_counted"] == ["mlp-1"]
    assert lines[2]["replies"]["received"] == 2
    assert lines[2]["replies"]["busy"] == []
    # Batch 1 was taught again, with both answers.
    logits = [answer.report.client for answer in taught_again[1]]
    assert logits == ["mlp-0", "mlp-1"]
