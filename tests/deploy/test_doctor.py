"""The doctor on real certificates, listeners, health servers, data and folders: `ok`, or what to do."""

import contextlib
import datetime
import re
import socket
import ssl
import threading
from concurrent import futures
from importlib.metadata import version

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from packaging.requirements import Requirement
from PIL import Image

from fedmmkt.client_app.privacy.ledger import PrivacyLedger, create_ledger
from fedmmkt.common.config import DataConfig
from fedmmkt.common.datasets import load_splits
from fedmmkt.common.privacy import Budget
from fedmmkt.deploy.certificates import make_ca, make_node_key, make_server_certificate, make_superexec_secret
from fedmmkt.deploy.connection_checks import read_connection, split_address
from fedmmkt.deploy.doctor import main
from fedmmkt.deploy.federation import connect
from fedmmkt.deploy.host_checks import mismatch
from fedmmkt.deploy.partition import write_partitions
from fedmmkt.deploy.processes import free_port


@pytest.fixture
def pki(tmp_path):
    folder = tmp_path / "pki"
    make_ca(folder)
    make_server_certificate(folder, ["superlink.example"], ["10.0.0.7"])
    return folder


@pytest.fixture
def doctor(capsys):
    """Return a function that calls the doctor and gives its exit code and its lines but the versions'."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        versions, *lines = capsys.readouterr().out.splitlines()
        assert versions.startswith("ok    versions: fedmmkt ")
        return code, lines

    return call


@contextlib.contextmanager
def tls_listener(certificate, key, speaks="h2"):
    """Accept TLS connections on loopback; give its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([speaks])
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    context.wrap_socket(connection, server_side=True).recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def self_signed(path, host, days_old, days):
    """Write a certificate of its own for a host; return it and its key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days_old)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, start, start + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    path.write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.with_suffix(".key").write_bytes(key.private_bytes(*form))
    return path, path.with_suffix(".key")


def test_a_server_with_all_in_order_gets_ok_only(doctor, pki):
    secret = make_superexec_secret(pki)

    code, lines = doctor(
        "--ca", pki / "ca.crt", "--certificate", pki / "server.pem", "--certificate-key", pki / "server.key",
        "--host", "superlink.example", "10.0.0.7", "--key", secret,
    )  # fmt: skip

    assert code == 0
    assert all(line.startswith("ok    ") for line in lines)
    assert len(lines) == 8


def test_a_key_that_others_can_read_is_named_with_the_remedy(doctor, pki):
    (pki / "server.key").chmod(0o640)

    code, lines = doctor("--key", pki / "server.key")

    assert code == 1
    assert lines == [
        f"WRONG private: {pki / 'server.key'} has mode 0640, so that others may use it; chmod 600 {pki / 'server.key'}"
    ]


def test_a_host_that_the_certificate_does_not_name(doctor, pki):
    code, lines = doctor("--certificate", pki / "server.pem", "--host", "10.0.0.8")

    assert code == 1
    assert "does not name 10.0.0.8, but superlink.example, localhost, 10.0.0.7, 127.0.0.1; add it" in lines[-1]


@pytest.mark.parametrize(
    ("age", "days", "said"), [(40, 30, "expired on"), (10, 30, "expires on"), (-2, 30, "is valid from")]
)
def test_the_dates_of_a_certificate(doctor, tmp_path, age, days, said):
    path, _ = self_signed(tmp_path / "server.pem", "localhost", age, days)

    code, lines = doctor("--certificate", path)

    assert code == 1
    assert said in lines[0]


def test_files_that_are_no_certificate_or_not_there(doctor, tmp_path, pki):
    (tmp_path / "garbage.pem").write_text("not PEM")

    code, lines = doctor("--ca", tmp_path / "missing.crt", "--certificate", tmp_path / "garbage.pem")

    assert code == 1
    assert "missing.crt" in lines[0]
    assert "garbage.pem is no certificate in PEM" in lines[1]


def test_a_certificate_of_another_ca_and_a_key_of_another_certificate(doctor, pki, tmp_path):
    other, _ = make_ca(tmp_path / "other")
    _, key = make_server_certificate(tmp_path / "other", ["superlink.example"])

    code, lines = doctor("--ca", other, "--certificate", pki / "server.pem", "--certificate-key", key)

    assert code == 1
    assert [line[:6] for line in lines] == ["ok    ", "ok    ", "WRONG ", "ok    ", "WRONG "]
    assert f"is not signed by {other}" in lines[2]
    assert f"{key} is not the key of" in lines[4]


def test_a_listener_of_the_right_ca_and_of_a_wrong_one(doctor, pki, tmp_path):
    other, _ = make_ca(tmp_path / "other")
    with tls_listener(pki / "server.pem", pki / "server.key") as address:
        right = doctor("--ca", pki / "ca.crt", "--superlink", address)
        wrong = doctor("--ca", other, "--superlink", address)

    assert right[0] == 0
    assert "has a certificate of this CA (TLSv1.3)" in right[1][-1]
    assert wrong[0] == 1
    assert wrong[1][-1].startswith("WRONG TLS: wrong CA: ")
    assert "copy the ca.crt of the SuperLink's host" in wrong[1][-1]


@pytest.mark.parametrize(
    ("host", "age", "said"), [("localhost", 40, "is out of date"), ("elsewhere.example", 1, "does not name localhost")]
)
def test_a_listener_whose_certificate_is_out_of_date_or_of_another_name(doctor, tmp_path, host, age, said):
    certificate, key = self_signed(tmp_path / "server.pem", host, age, 35)

    with tls_listener(certificate, key) as address:
        code, lines = doctor("--ca", certificate, "--superlink", f"localhost:{split_address(address)[1]}")

    assert code == 1
    assert said in lines[-1]


def test_a_port_for_submitters_is_none_for_nodes(doctor, pki):
    with tls_listener(pki / "server.pem", pki / "server.key", speaks="http/1.1") as address:
        code, lines = doctor("--ca", pki / "ca.crt", "--superlink", address)

    assert code == 1
    assert "speaks HTTP; nodes need the Fleet API's address" in lines[-1]


def test_a_port_without_tls_one_that_nobody_listens_on_and_an_unknown_host(doctor, pki):
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_in_plain_text, args=(server,))
        thread.start()
        plain = f"127.0.0.1:{server.getsockname()[1]}"
        nobody = f"127.0.0.1:{free_port()}"
        code, lines = doctor("--ca", pki / "ca.crt", "--superlink", plain, nobody, "nowhere.invalid:9092")
        thread.join()

    assert code == 1
    assert "speaks no TLS" in lines[2]
    assert f"nothing listens on {nobody}" in lines[3]
    assert "nowhere.invalid is not known here" in lines[5]


def answer_in_plain_text(server):
    for _ in range(2):
        with server.accept()[0] as connection:
            connection.sendall(b"hello, who is there?")


def test_grpc_health(doctor):
    server, service = grpc.server(futures.ThreadPoolExecutor(1)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        serving = doctor("--health", address)
        service.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        not_serving = doctor("--health", address)
    finally:
        server.stop(None).wait()

    assert serving == (0, [f"ok    health: {address} serves"])
    assert not_serving[0] == 1
    assert "does not say that it serves" in not_serving[1][0]


def test_a_node_key_of_the_right_kind_and_what_its_refusal_means(doctor, pki):
    key, _ = make_node_key(pki, "clinic")

    right = doctor("--node-key", key)
    wrong = doctor("--node-key", pki / "server.key")

    assert right[0] == 0
    assert "code 2004" in right[1][0]
    assert "flwr supernode register clinic.key.pub" in right[1][0]
    assert wrong[0] == 1
    assert "OpenSSH" in wrong[1][0]


@pytest.fixture
def node_config(tmp_path):
    """Return a function that writes a node-config for data of ten handwritten digits' classes, with changes."""
    (folder,) = write_partitions(DataConfig(partitioner="iid"), 1, 0, tmp_path / "data")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)

    def make(**changes):
        values = {"data-path": folder, "model": "text", "state-dir": state}
        values |= {key.replace("_", "-"): value for key, value in changes.items()}
        return " ".join(f'{key}="{value}"' for key, value in values.items())

    return make


@pytest.mark.parametrize("classes", ["", "clients"])
def test_a_node_with_all_in_order(doctor, node_config, classes):
    code, lines = doctor("--node-config", node_config(), "--run-config", f'data.classes="{classes}"')

    assert code == 0
    assert lines[0] == "ok    model: text reads text, runs on cpu"
    assert "has 1438 examples to learn (zero 1" in lines[1]  # 1797 digits, a fifth of them held out
    assert lines[1].endswith("and 359 to test")
    assert "is writable and for its owner only" in lines[2]
    assert "GiB free" in lines[3]


def test_the_dataset_of_a_simulation(doctor, tmp_path):
    (tmp_path / "notes.csv").write_text("text,label\n" + "a,b\n" * 8 + ",b\n" + "c,d\n" * 6)

    code, lines = doctor("--data", "--run-config", f'data.dataset="{tmp_path / "notes.csv"}"')
    other, refused = doctor("--data", "--run-config", f'data.dataset="{tmp_path / "gone.csv"}"')

    assert (code, other) == (0, 1)
    assert lines[0].endswith(
        "notes.csv has 11 examples to learn (b 6, d 5) and 3 to test; left out: row 8 of notes.csv"
    )
    assert refused[0].startswith("WRONG dataset: run-config key 'data.dataset' is ")


def test_wrong_classes_repeated_photos_and_a_column_of_splits(doctor, tmp_path):
    for index in range(20):
        Image.new("RGB", (8, 8), (index // 2 * 10, 0, 0)).save(tmp_path / f"{index}.png")  # Each colour twice.
    lines = [f"{index}.png,{'ab'[index % 2]},train" for index in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label,split", *lines]))
    settings = f'data.dataset="{tmp_path / "t.csv"}"'

    code, (line,) = doctor("--data", "--run-config", settings)
    wrong, (refused,) = doctor("--data", "--run-config", settings + ' data.classes="a,c"')

    assert (code, wrong) == (0, 1)
    assert "; the column 'split' (train) is not used: splits are files" in line
    assert re.search(r"; 10 images are the same as another, \d of them to learn and to test$", line)
    assert "holds 'a, b': the column has no c; the key does not name b; allowed: " in refused


def test_test_images_that_are_also_learned_from_are_wrong(doctor, tmp_path):
    for index in range(20):
        Image.new("RGB", (8, 8), (10 * index, 0, 0)).save(tmp_path / f"{index}.png")
    rows = [f"{index}.png,{'ab'[index % 2]}" for index in range(20)]
    for name, lines in (("train", rows[:12]), ("test", rows[12:]), ("photos", rows)):
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,label", *lines]))
    settings = f'data.dataset="{tmp_path}"'
    node = ("--node-config", f'data-path="{tmp_path}" model="cnn"', "--run-config", 'data.classes="a,b"')

    code, (line,) = doctor("--data", "--run-config", settings)
    own = doctor(*node)[1][1]
    (tmp_path / "photos.csv").rename(tmp_path / "photos.csv.old")
    load_splits.cache_clear()
    right, (read,) = doctor("--data", "--run-config", settings)

    assert (code, right) == (1, 0)
    for told in (line, own):
        assert "of whose 8 test images 8 are also among those to learn" in told
        assert "row 0 of test.csv is row 12 of photos.csv, row 1 of test.csv is row 13 of photos.csv and 6 more" in told
        assert "read are photos.csv, train.csv to learn and test.csv to test" in told
    assert (
        "has 12 examples to learn (a 6, b 6) and 8 to test; read are train.csv to learn, and test.csv to test" in read
    )


def test_only_what_a_client_learns_from_is_counted(doctor, tmp_path):
    for index in range(1, 20):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "19.png").write_bytes((tmp_path / "19.png").read_bytes()[:40])
    lines = [f"{index}.png,a text,{'ab'[index % 2]}" for index in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["image,text,label", *lines]))
    settings = f'data.dataset="{tmp_path / "t.csv"}"'

    code, (line,) = doctor("--data", "--run-config", settings)
    images_alone = doctor("--data", "--run-config", settings + ' data.text-column="none"')[1][0]
    own = doctor(
        "--node-config", f'data-path="{tmp_path / "t.csv"}" model="cnn"', "--run-config", 'data.classes="a,b"'
    )[1]

    said, texts = line.split("; for models that read texts: ")
    assert code == 0
    assert sum(map(int, re.search(r"has (\d+) examples .* and (\d+) to test", said).groups())) == 18
    assert re.search(r"row 0 of t.csv \(its image '.*/0.png' is not there\)", said)
    assert re.search(r"row 19 of t.csv \(its image '.*/19.png' does not decode: ", said)
    assert texts.endswith("t.csv has 16 examples to learn (a 8, b 8) and 4 to test")
    assert said.removeprefix("ok    dataset: for models that read images: ") in images_alone
    assert "row 0 of t.csv (its image" in own[1]


def test_data_columns_model_and_classes_that_are_not_there(doctor, node_config):
    asked = [
        (node_config(data_path="/nowhere"), "data-path' is '/nowhere', which is not there"),
        (node_config(text_column="words"), "text-column' is 'words'"),
        (node_config(model="perceptron"), "node-config key 'model' is 'perceptron', but no task model is registered"),
    ]
    for config, said in asked:
        code, lines = doctor("--node-config", config)
        assert code == 1
        assert any(line.startswith("WRONG ") and said in line for line in lines), lines

    code, lines = doctor("--node-config", node_config(), "--run-config", 'data.classes="zero,one"')
    assert code == 1
    assert lines[1].startswith("WRONG data: ")


@pytest.fixture
def ledger(tmp_path):
    create_ledger(tmp_path / "ledger.jsonl", Budget(8.0))
    return tmp_path / "ledger.jsonl"


def test_a_privacy_ledger_in_order_and_one_that_is_spent_or_missing(doctor, node_config, ledger, tmp_path):
    fresh = doctor("--node-config", node_config(privacy_ledger=ledger))
    used = PrivacyLedger(ledger, tmp_path / "state" / "privacy")
    origin, plan = used.plan("run", (), rounds=1)
    used.answer("counts", np.array([1]), 1.0, plan.counts, origin)
    used.answer("votes", np.array([1]), 1.0, plan.votes, origin)
    spent = doctor("--node-config", node_config(privacy_ledger=ledger))
    ledger.unlink()
    missing = doctor("--node-config", node_config(privacy_ledger=ledger))

    assert (fresh[0], fresh[1][2]) == (
        0,
        f"ok    privacy ledger: {ledger} has spent epsilon 0 of 8 at delta 1e-05, in 0 run(s)",
    )
    assert spent[0] == missing[0] == 1
    assert spent[1][2].startswith(
        f"WRONG privacy ledger: {ledger} has spent epsilon 8 of 8 at delta 1e-05, in 1 run(s): a"
    )
    assert "cannot be opened (No such file or directory); nothing is answered until there is a new" in missing[1][2]


def test_classes_that_a_node_with_a_privacy_ledger_does_not_have(doctor, node_config, ledger):
    """Without a ledger they are refused; with one the server is told nothing, so the operator is."""
    config = node_config(privacy_ledger=ledger)

    some = doctor("--node-config", config, "--run-config", 'data.classes="zero,one"')
    none = doctor("--node-config", config, "--run-config", 'data.classes="null,eins"')

    assert (some[0], none[0]) == (0, 1)
    assert re.search(
        r"^ok    data: .* examples to learn \(zero \d+, one \d+\) and \d+ to test; left out: \d+ of \d+ examples, of "
        r"classes that the run does not have \(eight, five, four, nine, seven and 3 more\), ",
        some[1][1],
    )
    assert none[1][1].startswith("WRONG data: ")
    assert "has 0 examples to learn () and 0 to test; left out: " in none[1][1]
    assert "; the run's classes are null, eins ('data.classes'): a node with these data would answer" in none[1][1]


def test_state_that_others_can_read_a_missing_folder_and_a_full_disk(doctor, node_config, tmp_path):
    (tmp_path / "state").chmod(0o755)

    code, lines = doctor("--node-config", node_config(), "--folder", tmp_path / "missing", "--free", 1e9)

    assert code == 1
    assert f"chmod 700 {tmp_path / 'state'}" in lines[2]
    assert "GiB free, less than 1e+09" in lines[3]
    assert f"install -d -m 700 {tmp_path / 'missing'}" in lines[4]


def test_the_servers_t2i_model(doctor, tmp_path):
    right = doctor("--t2i")
    wrong = doctor("--t2i", "--run-config", f't2i.model="{tmp_path}"')

    assert right == (0, ["ok    T2I model: starter is a StableDiffusionPipeline of 32 pixels, runs on cpu"])
    assert wrong[0] == 1
    assert "holds no model_index.json" in wrong[1][0]


def test_settings_that_cannot_be_read_end_before_any_check(capsys):
    assert main(["--node-config", "model = cnn"]) == 2
    assert main(["--data", "--run-config", "rounds = 0"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["--host", "superlink.example"])
    assert capsys.readouterr().out == ""


def test_wrong_keys_are_told_together_with_what_is_wrong_else(doctor, tmp_path):
    settings = f'rouns=3 t2i.guidance="x" data.dataset="{tmp_path / "gone.csv"}" t2i.model="{tmp_path}"'

    code, lines = doctor("--data", "--t2i", "--run-config", settings, "--node-config", 'modl="cnn"')
    unsure = doctor("--data", "--run-config", 'data.datset="birds.csv" data.image-column="photo"')[1]

    assert code == 1
    told = "\n".join(lines)
    for said in ("'rouns' is unknown", "'t2i.guidance' is 'x'", "gone.csv', which is not there", "no model_index.json"):
        assert said in told
    assert "node-config key 'modl' is unknown" in lines[-1]
    assert len(unsure) == 2  # of the digits, about which nobody asked, only that they can be read
    assert "'data.datset' is unknown (did you mean 'data.dataset'?)" in unsure[0]


def test_connections_are_read_as_they_are_written(tmp_path, pki):
    connect(tmp_path, "clinic", "superlink.example:9091", pki / "ca.crt")

    assert read_connection(tmp_path / "config.toml", "clinic") == ("superlink.example:9091", pki / "ca.crt")


def test_a_connection_that_is_not_there(doctor, tmp_path, monkeypatch, pki):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    missing = doctor("--connection", "clinic")
    connect(tmp_path, "clinic", "127.0.0.1:9091", pki / "ca.crt")
    other = doctor("--connection", "hospital")

    assert "config.toml cannot be read" in missing[1][0]
    assert "has no table [superlink.hospital]" in other[1][0]


def test_addresses():
    assert split_address("superlink.example:9092") == ("superlink.example", 9092)
    assert split_address("[fd00::7]:9092") == ("fd00::7", 9092)
    for wrong in ("superlink.example", "https://superlink.example:9092", ":9092", "host:0", "host:port"):
        with pytest.raises(ValueError, match="allowed: host:port"):
            split_address(wrong)


def test_packages_out_of_bounds_are_named():
    assert mismatch(Requirement("torch>=2,<3")) == []
    assert mismatch(Requirement("torch>=99")) == [f"torch {version('torch')} is not torch>=99"]
    assert mismatch(Requirement("no-such-package==1")) == ["no-such-package==1 is missing"]
