"""An adapter and its card are uploaded to a hub, here one on this machine; what hinders that is told."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import ModelCard

from fedmmkt.common.config import ConfigError, RunConfig, T2IConfig
from fedmmkt.server_app.publish.card import write_adapter_card
from fedmmkt.server_app.publish.push import main, prepare_upload
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.t2i.generator import Generator
from tests import ROOT, tiny_pipelines
from tests.server_app.report.test_page import make_line


def make_run(path, model="starter", **data):
    """Make a run folder with an adapter's files, as after round 0."""
    folder = RunFolder.create(path)
    config = RunConfig.model_validate({"t2i": {"model": model}, "data": data})
    described = {"config": config.model_dump(mode="json", by_alias=True), "classes": ["zero", "one"], "versions": {}}
    folder.write_config(described)
    folder.lora.mkdir()
    (folder.lora / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return path


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: it takes small files in the commit, and knows one token."""

    private = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests[self.path] = body
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path.endswith("/preupload/main"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"]} | how for file in json.loads(body)["files"]]})
        elif self.path.endswith("/commit/main"):
            self.answer(200, {"commitUrl": f"{self.server.url}/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer(200, {"url": self.server.url, "errors": [], "warnings": []})

    def do_GET(self):
        self.answer(200, {"id": "me/digits", "private": self.private, "sha": "1", "siblings": [], "tags": []})

    def answer(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep the console quiet."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.requests = f"http://127.0.0.1:{server.server_address[1]}/me/digits", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(run, *options, hub=None, token="hf_right", home):
    """Run the command as a user does, with a home of its own; return the finished process."""
    port = hub.server_address[1] if hub else 9  # Nothing listens on port 9, discard.
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    environment |= {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "fedmmkt", "push", str(run), "--to", "me/digits", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_adapter_and_its_card_are_uploaded_and_nothing_else(tmp_path, hub):
    run = make_run(tmp_path / "run")

    done = push(run, hub=hub, home=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/commit/1"
    created = json.loads(hub.requests["/api/repos/create"])
    assert (created["organization"], created["name"]) == ("me", "digits")
    lines = [json.loads(line) for line in hub.requests["/api/models/me/digits/commit/main"].splitlines()]
    uploaded = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
    assert uploaded == {
        "README.md": (run / "lora" / "README.md").read_bytes(),
        "pytorch_lora_weights.safetensors": b"weights",
    }
    assert "the licence" in done.stdout
    assert "hf_right" not in done.stdout + done.stderr + "".join(
        file.read_text() for file in run.rglob("*") if file.suffix in (".md", ".json")
    )


def test_a_public_repository_is_refused_where_a_private_one_was_asked_for(tmp_path, hub):
    done = push(make_run(tmp_path / "run"), "--private", hub=hub, home=tmp_path)

    assert done.returncode == 1
    assert "me/digits is there and public, and --private was asked for; nothing was uploaded" in done.stderr
    assert json.loads(hub.requests["/api/repos/create"])["visibility"] == "private"
    assert not [path for path in hub.requests if "commit" in path]


@pytest.mark.parametrize(("token", "reachable", "told"), [
    ("", True, "there is no login for the hub; log in by `hf auth login`, or set HF_TOKEN"),
    ("hf_wrong", True, r"does not know the login \(.*Invalid credentials.*\); log in by"),
    ("hf_right", False, r"http://127.0.0.1:9 cannot be reached \(.*refused.*\); check the network"),
])  # fmt: skip
def test_what_hinders_the_upload_is_told(tmp_path, hub, token, reachable, told):
    done = push(make_run(tmp_path / "run"), hub=hub if reachable else None, token=token, home=tmp_path)

    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fedmmkt push: ")]
    assert re.search(told, line)
    assert not token or token not in done.stderr
    assert not [path for path in hub.requests if "commit" in path]


def test_a_dry_run_lists_files_and_bytes_and_asks_nothing_of_the_hub(tmp_path, capsys):
    run = make_run(tmp_path / "run")

    assert main([str(run), "--to", "me/digits", "--dry-run"]) == 0

    shown = capsys.readouterr().out.splitlines()
    card = (run / "lora" / "README.md").stat().st_size
    assert shown[0] == f"{run / 'lora'} to me/digits:"
    assert shown[2:4] == ["  pytorch_lora_weights.safetensors  7 B", f"  {card + 7} bytes in all"]


def test_a_card_that_somebody_edited_stays(tmp_path):
    run = make_run(tmp_path / "run")
    card = write_adapter_card(run)
    card.write_text("mine")

    prepare_upload(run, "me/digits")

    assert card.read_text() == "mine"


@pytest.mark.parametrize("target", ["digits", "me/digits/x", "me/-digits", "me/dig its"])
def test_a_wrong_name_is_refused(tmp_path, target):
    with pytest.raises(ConfigError, match=f"--to is '{target}'; allowed: owner/name"):
        prepare_upload(make_run(tmp_path / "run"), target)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing' holds no adapter: .* allowed: the folder of a run that has ended"):
        prepare_upload(tmp_path / "nothing", "me/digits")


def test_private_files_and_classes_of_clients_are_not_named_in_a_card(tmp_path):
    secret = tmp_path / "patients.csv"
    run = make_run(tmp_path / "run", "owner/model", dataset=str(secret), classes=["clients"])

    card = write_adapter_card(run).read_text()

    header = ModelCard(card).data.to_dict()
    assert (header["base_model"], header["base_model_relation"]) == ("owner/model", "adapter")
    assert "private data" in card
    assert "the names of its classes" in card
    assert not [word for word in ("patients", str(tmp_path), "zero") if word in card]


def test_a_dataset_of_the_hub_is_named_in_a_card(tmp_path):
    card = write_adapter_card(make_run(tmp_path / "run", dataset="owner/birds")).read_text()

    assert "datasets: owner/birds\n" in card


def test_the_card_of_a_peft_adapter_loads_it(tmp_path, monkeypatch):
    model = tiny_pipelines.save("pixart-alpha", tmp_path / "pixart")
    run = make_run(tmp_path / "run", model)
    (run / "lora" / "pytorch_lora_weights.safetensors").unlink()
    generator = Generator(T2IConfig(model=model, device=["cpu"]), seed=0)
    generator.adapter.save(run / "lora")

    card = write_adapter_card(run).read_text()

    assert "library_name: peft\n" in card
    assert str(tmp_path) not in card + (run / "lora" / "adapter_config.json").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)  # Where the folder of the base model is.
    variables = {}
    code = code.replace('adapter = "."', 'adapter = "run/lora"')
    exec(code.replace("num_inf", "use_resolution_binning=False, num_inf"), variables)  # Real sizes need no such word.
    assert variables["image"].size == (16, 16)
    loaded = {name: p for name, p in variables["pipeline"].transformer.named_parameters() if "lora_" in name}
    state = generator.adapter.state()
    assert len(loaded) == len(state)
    assert any(torch.equal(parameter, tensor) for parameter in loaded.values() for tensor in state.values())


def test_a_card_says_whether_the_adapter_was_trained(tmp_path):
    def card(name, scores="feedback", last=1, rounds=1, failure=""):
        run = RunFolder(make_run(tmp_path / name))
        described = run.read_config()
        described["config"]["rounds"] = rounds
        described["config"]["t2i"] |= {"scores": scores, "guard": 0.0}
        run.write_config(described)
        run.append_metrics(make_line(last, {"cnn-0": 0.5}))
        run.write_failure(failure)
        return write_adapter_card(run.path).read_text()

    trained, frozen = card("trained"), card("frozen", scores="none")
    failed, begun = card("failed", last=2, rounds=4, failure="no memory"), card("begun", last=0, failure="no memory")

    assert "It was trained by [FedMMKT]" in trained
    assert "## How it was trained" in trained
    assert "It was not trained" not in trained + failed
    assert "**It was not trained**: the run left the model as it is (`t2i.scores` was `none`)" in frozen
    assert "Update per round" not in frozen
    assert "rained on prompts" not in frozen + begun
    assert "## The run" in frozen
    assert "**The run failed**; this is the adapter after round 2 of 4." in failed
    assert "**It was not trained**: no round of training has ended" in begun
    assert "no memory" not in failed + begun  # The cause may name clients and files.


@pytest.mark.parametrize(
    ("verdicts", "trained"), [(["taken back", "undecided"], False), (["accepted", "taken back"], True)]
)
def test_a_card_says_if_clients_accepted_no_update(tmp_path, verdicts, trained):
    run = RunFolder(make_run(tmp_path / "run"))
    described = run.read_config()
    described["config"]["t2i"]["guard"] = 0.125
    described["config"]["rounds"] = 3
    run.write_config(described)
    for number, verdict in enumerate(verdicts, start=2):
        guard = {"verdict": verdict, "preference": {}, "rounds": 1, "step": 0.5}
        run.append_metrics(make_line(number, {"cnn-0": 0.5}, guard=guard))

    card = write_adapter_card(run.path).read_text()

    assert ("It was trained by [FedMMKT]" in card) == ("## How it was trained" in card) == trained
    refused = (
        "**It was not trained**: the clients accepted none of its updates (`t2i.guard`), so that it has no effect."
    )
    assert (refused in card) == ("## The run" in card) == (not trained)


def test_a_card_tells_the_recall_of_the_t2i_if_it_was_measured(tmp_path):
    measured, unmeasured = (RunFolder(make_run(tmp_path / name)) for name in ("measured", "unmeasured"))
    for number, recall in ((1, 0.8), (2, 0.23)):
        generator = {"alignment": 0.5, "frechet": 90.0, "loss": None}
        measured.append_metrics(make_line(number, {"cnn-0": 0.5}, generator=generator | {"recall": recall}))
        unmeasured.append_metrics(make_line(number, {"cnn-0": 0.5}, generator=generator))

    card = ModelCard.load(write_adapter_card(measured.path))
    other = write_adapter_card(unmeasured.path).read_text()

    assert "| Recall of real images (how various the images are) | 80.0 % | 23.0 % |" in card.text
    assert ("recall", 0.23) in [(result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert "| Recall" not in other
