"""Certificates and keys of a federation: a CA, the server's certificate, and a key pair for each node.

``python -m deploy.certificates FOLDER --host fl.example.org --ip 192.0.2.7 --node clinic-a --node clinic-b``
makes what is missing and leaves alone what is there. Private keys can be read by their owner only.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.config import ConfigError

CA_DAYS = 3650
SERVER_DAYS = 365
_CLOCK_SKEW = timedelta(minutes=5)  # a host whose clock is a little behind must accept a new certificate


@dataclass(frozen=True)
class Authority:
    """Where a CA's certificate, which everybody gets, and its private key, which nobody gets, are."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class KeyPair:
    """Where a private key and what belongs to it in public (a certificate or a public key) are."""

    public: Path
    key: Path


def make_authority(folder: Path, replace: bool = False, days: int = CA_DAYS) -> Authority:
    """Make ``ca.crt`` and ``ca.key``.

    Parameters
    ----------
    folder : Path
        Made if it is not there, for its owner only.
    replace : bool
        Whether files that are there are replaced; every certificate signed before is then worthless.
    days : int
        For how long it is valid.

    Raises
    ------
    ConfigError
        If a file is there and is not to be replaced, or the folder cannot be written.
    """
    authority = Authority(folder / "ca.crt", folder / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedMMKT CA")])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write_pair(authority.key, _pem(key), authority.certificate, _pem(certificate), replace)
    return authority


def make_server_certificate(
    folder: Path,
    hosts: Sequence[str],
    addresses: Sequence[str] = (),
    replace: bool = False,
    days: int = SERVER_DAYS,
) -> KeyPair:
    """Make ``server.pem`` and ``server.key``, signed by the folder's CA.

    Parameters
    ----------
    folder : Path
        Holds the CA of `make_authority`.
    hosts, addresses : sequence of str
        Every DNS name and IP address by which nodes and submitters will call the server.
    replace : bool
        Whether files that are there are replaced, as when the old certificate ends.
    days : int
        For how long it is valid.

    Raises
    ------
    ConfigError
        If there is no CA, no name, an address that is none, or a file that is not to be replaced.
    """
    if not hosts and not addresses:
        raise ConfigError("a server certificate needs the names it is called by: --host NAME or --ip ADDRESS")
    names: list[x509.GeneralName] = [x509.DNSName(host) for host in hosts]
    for address in addresses:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            raise ConfigError(f"--ip is {address!r}; allowed: an IPv4 or IPv6 address (names go to --host)") from None
    authority, authority_key = _load_authority(folder)
    pair = KeyPair(folder / "server.pem", folder / "server.key")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ([*hosts, *addresses])[0][:64])])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    _write_pair(pair.key, _pem(key), pair.public, _pem(certificate), replace)
    return pair


def make_node_key(folder: Path, name: str, replace: bool = False) -> KeyPair:
    """Make ``nodes/NAME.key`` and ``nodes/NAME.key.pub``, by which Flower knows a node (ECDSA, P-384).

    Better made on the node itself, so that only the public half travels.

    Raises
    ------
    ConfigError
        If the name is no file name, or a file is there and is not to be replaced.
    """
    if not name or Path(name).name != name:
        raise ConfigError(f"--node is {name!r}; allowed: a name without slashes")
    pair = KeyPair(folder / "nodes" / f"{name}.key.pub", folder / "nodes" / f"{name}.key")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write_pair(pair.key, private, pair.public, public + f" {name}\n".encode(), replace)
    return pair


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.certificates", description=__doc__)
    parser.add_argument("folder", type=Path, help="where they are kept; never in a repository")
    parser.add_argument("--host", action="append", default=[], help="a DNS name of the server; may be repeated")
    parser.add_argument("--ip", action="append", default=[], help="an IP address of the server; may be repeated")
    parser.add_argument("--node", action="append", default=[], help="a node that gets a key; may be repeated")
    parser.add_argument("--days", type=int, default=SERVER_DAYS, help="how long the server's certificate is valid")
    parser.add_argument("--force", action="store_true", help="replace the server's and the named nodes' files")
    options = parser.parse_args(arguments)
    try:
        if not (options.folder / "ca.key").exists():
            print(f"CA                  {make_authority(options.folder).certificate}")
        if options.host or options.ip:
            made = make_server_certificate(options.folder, options.host, options.ip, options.force, options.days)
            print(f"server certificate  {made.public}")
        for node in options.node:
            print(f"node key            {make_node_key(options.folder, node, options.force).public}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"--days is {days}; allowed: 1 to {CA_DAYS}")
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"no CA in {str(folder)!r} (ca.crt, ca.key): {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}")
    return certificate, key


def _pem(item: ec.EllipticCurvePrivateKey | x509.Certificate) -> bytes:
    if isinstance(item, x509.Certificate):
        return item.public_bytes(serialization.Encoding.PEM)
    return item.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_pair(key: Path, private: bytes, other: Path, public: bytes, replace: bool) -> None:
    """Write a private key, never readable by others, not even for a moment, and then what belongs to it."""
    for path in (key, other):
        if path.exists() and not replace:
            raise ConfigError(f"{path} is there already; --force replaces it")
    try:
        key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content, mode in ((key, private, 0o600), (other, public, 0o644)):
            new = path.with_name(path.name + ".new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
            new.replace(path)
    except OSError as error:
        raise ConfigError(f"{error.filename or key} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
