"""Certificates and keys: who signed them, for which names, and who may read them."""

import stat
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from common.config import ConfigError
from deploy.certificates import main, make_authority, make_node_key, make_server_certificate


def load(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_server_certificate_is_signed_by_the_ca_for_every_name(tmp_path):
    authority = make_authority(tmp_path / "pki")

    pair = make_server_certificate(tmp_path / "pki", ["fl.example.org", "localhost"], ["127.0.0.1", "::1"], days=30)

    certificate = load(pair.public)
    certificate.verify_directly_issued_by(load(authority.certificate))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 30
    key = serialization.load_pem_private_key(pair.key.read_bytes(), password=None)
    assert key.public_key() == certificate.public_key()


def test_private_keys_are_for_their_owner_only(tmp_path):
    authority = make_authority(tmp_path / "pki")
    server = make_server_certificate(tmp_path / "pki", ["localhost"])
    node = make_node_key(tmp_path / "pki", "clinic-a")

    modes = {stat.S_IMODE(path.stat().st_mode) for path in (authority.key, server.key, node.key)}

    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "pki").stat().st_mode) == 0o700


def test_node_key_is_of_the_form_that_flower_registers(tmp_path):
    pair = make_node_key(tmp_path, "clinic-a")

    public = serialization.load_ssh_public_key(pair.public.read_bytes())

    assert public.curve.name == "secp384r1"
    assert pair.public.read_text().endswith(" clinic-a\n")
    assert serialization.load_ssh_private_key(pair.key.read_bytes(), None).public_key() == public


def test_nothing_is_replaced_unless_asked(tmp_path):
    make_authority(tmp_path)
    before = make_server_certificate(tmp_path, ["localhost"]).key.read_bytes()

    with pytest.raises(ConfigError, match="there already"):
        make_authority(tmp_path)
    with pytest.raises(ConfigError, match="--force"):
        make_server_certificate(tmp_path, ["localhost"])

    assert (tmp_path / "server.key").read_bytes() == before
    assert make_server_certificate(tmp_path, ["localhost"], replace=True).key.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ip", "fl.example.org"], "fl.example.org"),
        (["--host", "localhost", "--days", "0"], "--days is 0"),
        (["--node", "../x"], "without slashes"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, said):
    code = main([str(tmp_path), *arguments])

    assert code == 2
    assert said in capsys.readouterr().err


def test_command_adds_to_what_is_there(tmp_path, capsys):
    assert main([str(tmp_path), "--host", "localhost", "--node", "a"]) == 0
    authority = (tmp_path / "ca.crt").read_bytes()

    code = main([str(tmp_path), "--node", "b"])

    assert code == 0
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert (tmp_path / "nodes" / "b.key.pub").exists()
    assert "b.key.pub" in capsys.readouterr().out
