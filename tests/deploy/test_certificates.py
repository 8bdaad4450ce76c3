"""Certificates and keys: who is named in them, that the chain verifies, and who may read them."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedmmkt.common.config import ConfigError
from fedmmkt.deploy.certificates import main, make_ca, make_node_key, make_server_certificate, make_superexec_secret
from tests import ROOT


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pki"


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verify(ca: Path, certificate: Path, host: str) -> None:
    policy = PolicyBuilder().store(Store([load(ca)]))
    policy.build_server_verifier(x509.DNSName(host)).verify(load(certificate), [])


def test_the_server_certificate_names_every_host_and_address(folder):
    make_ca(folder)
    certificate_path, _ = make_server_certificate(folder, ["fl.example.org", "localhost"], ["10.0.0.7", "fd00::7"], 30)
    certificate = load(certificate_path)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == list(
        map(ipaddress.ip_address, ["10.0.0.7", "fd00::7", "127.0.0.1"])
    )
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now
    assert abs(certificate.not_valid_after_utc - now - datetime.timedelta(days=30)) < datetime.timedelta(minutes=5)


def test_the_chain_verifies_for_its_names_and_its_ca_only(folder, tmp_path):
    ca, _ = make_ca(folder)
    certificate, _ = make_server_certificate(folder, ["fl.example.org"])
    other, _ = make_ca(tmp_path / "other")
    verify(ca, certificate, "fl.example.org")
    with pytest.raises(VerificationError):
        verify(ca, certificate, "elsewhere.example.org")
    with pytest.raises(VerificationError):
        verify(other, certificate, "fl.example.org")


def test_a_tls_connection_works_under_pythons_strictest_checks(folder):
    ca, _ = make_ca(folder)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(*make_server_certificate(folder, ["fl.example.org"]))
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ends = [ssl.MemoryBIO() for _ in range(4)]
    accepted = server.wrap_bio(ends[0], ends[1], server_side=True)
    connected = client.wrap_bio(ends[2], ends[3], server_hostname="127.0.0.1")
    for _ in range(6):
        for side in (connected, accepted):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
            ends[0].write(ends[3].read())
            ends[2].write(ends[1].read())
    assert connected.version() == "TLSv1.3"
    assert ("IP Address", "127.0.0.1") in connected.getpeercert()["subjectAltName"]


def test_a_node_key_is_what_flower_takes(folder):
    key_path, public_path = make_node_key(folder, "hospital-1")
    key = serialization.load_ssh_private_key(key_path.read_bytes(), None)
    public = serialization.load_ssh_public_key(public_path.read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert key.public_key() == public
    assert public_path.read_text().endswith(" hospital-1\n")
    assert (key_path, public_path) == (folder / "nodes/hospital-1.key", folder / "nodes/hospital-1.key.pub")


def test_only_the_owner_reads_private_keys(folder):
    make_ca(folder)
    make_server_certificate(folder, ["a.example.org"])
    make_node_key(folder, "one")
    make_superexec_secret(folder)
    modes = {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.key")}
    assert modes == dict.fromkeys(("ca.key", "server.key", "nodes/one.key", "superexec.key"), 0o600)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "nodes")} == {0o700}


def test_a_folder_that_others_may_read_is_refused(folder):
    folder.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"pki has mode 0755.*chmod 700"):
        make_ca(folder)
    assert not list(folder.iterdir())


def test_nothing_is_overwritten_unless_asked(folder):
    makers = (make_ca, lambda *a, **k: make_server_certificate(*a, ["x"], **k), make_superexec_secret)
    for make in (*makers, lambda *a, **k: make_node_key(*a, "one", **k)):
        made = make(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
        with pytest.raises(ConfigError, match="would be overwritten; --force replaces it"):
            make(folder)
        assert before == {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
        make(folder, force=True)
        changed = {path for path, content in before.items() if path.read_bytes() != content}
        assert changed == (set(made) if isinstance(made, tuple) else {made})


@pytest.mark.parametrize(
    ("hosts", "ips", "days", "message"),
    [
        (["https://x.org"], [], 9, "host is 'https://x.org'; allowed: a DNS name without scheme"),
        (["10.0.0.1"], [], 9, "'10.0.0.1', which is an address.*--ip"),
        (["bad_name.org"], [], 9, "host is 'bad_name.org'"),
        (["x.org"], ["x.org"], 9, "ip is 'x.org'"),
        (["x.org"], [], 99, "--days is 99, but the CA"),
    ],
)
def test_bad_names_and_dates_are_refused(folder, hosts, ips, days, message):
    make_ca(folder, days=10)
    with pytest.raises(ConfigError, match=message):
        make_server_certificate(folder, hosts, ips, days)
    assert {path.name for path in folder.iterdir()} == {"ca.crt", "ca.key"}


@pytest.mark.parametrize("name", ["", "../one", "a/b", ".hidden", "x" * 101])
def test_bad_node_names_are_refused(folder, name):
    with pytest.raises(ConfigError, match="node name is"):
        make_node_key(folder, name)


def test_a_missing_damaged_or_foreign_ca_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"ca.crt cannot be read.*make a CA first"):
        make_server_certificate(folder, ["x"])
    make_ca(folder)
    _, other_key = make_ca(tmp_path / "other")
    (folder / "ca.key").write_bytes(other_key.read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        make_server_certificate(folder, ["x"])
    (folder / "ca.key").write_bytes(b"")
    with pytest.raises(ConfigError, match="is damaged"):
        make_server_certificate(folder, ["x"])


def test_the_command_makes_all_and_later_adds_a_node_or_renews_under_the_same_ca(folder, capsys):
    assert main([str(folder), "--host", "a.org", "b.org", "--ip", "10.0.0.1", "--node", "one", "two"]) == 0
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    keys = {f"nodes/{name}.key{end}" for name in ("one", "two") for end in ("", ".pub")}
    assert made == {"ca.crt", "ca.key", "server.pem", "server.key", "superexec.key"} | keys
    assert capsys.readouterr().out.splitlines()[0] == str(folder / "ca.crt")
    ca, server = (folder / "ca.crt").read_bytes(), (folder / "server.pem").read_bytes()

    assert main([str(folder), "--node", "three"]) == 0
    assert main([str(folder), "--host", "a.org"]) == 2
    assert "server.pem and" in capsys.readouterr().err
    assert (folder / "server.pem").read_bytes() == server
    assert main([str(folder), "--host", "c.org", "--force"]) == 0

    assert (folder / "ca.crt").read_bytes() == ca
    verify(folder / "ca.crt", folder / "server.pem", "c.org")


def test_the_command_says_what_is_missing(folder, capsys):
    assert main([str(folder)]) == 2
    assert "nothing to make" in capsys.readouterr().err
    assert not folder.exists()


def test_the_command_makes_what_is_asked_for(folder):
    command = [sys.executable, "-m", "fedmmkt", "certificates", str(folder), "--host", "x.org"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (folder / "server.pem").exists()
