"""Certificates and keys of a federation: its own CA, the server's certificate, and the nodes' keys.

``fedmmkt certificates FOLDER --host NAME`` makes all files for a server. ``--node NAME`` makes the key of a node. The
files in the folder go to different machines. A node gets ``ca.crt`` and its own ``nodes/NAME.key``. A submitter gets
``ca.crt``. The server gets ``ca.crt``, ``server.pem``, ``server.key``, ``superexec.key`` and the nodes' public keys.
``ca.key`` stays where it is.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmmkt.common.config import ConfigError
from fedmmkt.common.files import write_atomically

CA_DAYS = 3650
SERVER_DAYS = 365
# The server's own processes use these, whatever its public name is.
LOCAL_HOSTS, LOCAL_ADDRESSES = ("localhost",), ("127.0.0.1",)

_CLOCK_SKEW = datetime.timedelta(hours=1)  # so that a node with a slow clock accepts a new certificate
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$)(\*\.)?{_LABEL}(\.{_LABEL})*")
_NODE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def make_ca(folder: Path, days: int = CA_DAYS, force: bool = False) -> tuple[Path, Path]:
    """Make a certificate authority, ``ca.crt`` and ``ca.key``.

    Parameters
    ----------
    folder : Path
        Created with mode 0700 if missing.
    days : int
        How long the certificate is valid.
    force : bool
        Whether existing files are replaced. All certificates of the old CA are then worthless.

    Returns
    -------
    tuple of Path
        Paths of certificate and private key.

    Raises
    ------
    ConfigError
        If others can read the folder, or a file exists and ``force`` is not set.
    """
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    _prepare(folder, (certificate_path, key_path), force)
    key = ec.generate_private_key(ec.SECP384R1())
    # A random part: two CAs with the same name would be confused, with an unclear error.
    name = _name(f"FedMMKT CA {secrets.token_hex(4)}")
    builder = _builder(name, name, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    _write_private(key_path, _pem(key))
    _write_public(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_path, key_path


def make_server_certificate(
    folder: Path, hosts: Iterable[str], ips: Iterable[str] = (), days: int = SERVER_DAYS, force: bool = False
) -> tuple[Path, Path]:
    """Make the SuperLink's certificate, ``server.pem`` and ``server.key``, signed by the folder's CA.

    Parameters
    ----------
    folder : Path
        Folder with the CA from `make_ca`.
    hosts, ips : iterable of str
        DNS names and IP addresses of the SuperLink. ``localhost`` and ``127.0.0.1`` are added.
    days : int
        How long the certificate is valid.
    force : bool
        Whether existing files are replaced.

    Returns
    -------
    tuple of Path
        Paths of certificate and private key.

    Raises
    ------
    ConfigError
        If a name or address is invalid, there is no CA, the CA would expire before the certificate, or a file exists
        and ``force`` is not set.
    """
    certificate_path, key_path = folder / "server.pem", folder / "server.key"
    names = [x509.DNSName(_checked_host(host)) for host in dict.fromkeys((*hosts, *LOCAL_HOSTS))]
    addresses = [x509.IPAddress(_checked_ip(ip)) for ip in dict.fromkeys((*ips, *LOCAL_ADDRESSES))]
    _prepare(folder, (certificate_path, key_path), force)
    ca_certificate, ca_key = _load_ca(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_name(names[0].value), ca_certificate.subject, key.public_key(), days)
    ends = _now() + datetime.timedelta(days=days)
    if ends > ca_certificate.not_valid_after_utc:
        raise ConfigError(
            f"--days is {days}, but the CA {folder / 'ca.crt'} ends on {ca_certificate.not_valid_after_utc:%Y-%m-%d}; "
            "allowed: an end before that, or a new CA in another folder"
        )
    ca_identifier = ca_certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([*names, *addresses]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier), False),
    ):
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(ca_key, hashes.SHA384())
    _write_private(key_path, _pem(key))
    _write_public(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_path, key_path


def make_node_key(folder: Path, name: str, force: bool = False) -> tuple[Path, Path]:
    """Make a SuperNode's private key ``nodes/NAME.key``, and its public key for ``flwr supernode register``.

    Parameters
    ----------
    folder : Path
        Created with mode 0700 if missing.
    name : str
        The node's name.
    force : bool
        Whether existing files are replaced. The node must then be registered again.

    Returns
    -------
    tuple of Path
        Paths of private key and public key (``nodes/NAME.key.pub``), in OpenSSH format.

    Raises
    ------
    ConfigError
        If the name is invalid, others can read the folder, or a file exists and ``force`` is not set.
    """
    if not _NODE_NAME.fullmatch(name):
        raise ConfigError(f"node name is {name!r}; allowed: letters, digits, '_', '-' and '.', at most 100")
    key_path, public_path = folder / "nodes" / f"{name}.key", folder / "nodes" / f"{name}.key.pub"
    _prepare(folder)
    _prepare(folder / "nodes", (key_path, public_path), force)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(key_path, _pem(key, serialization.PrivateFormat.OpenSSH))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write_public(public_path, public + f" {name}\n".encode())
    return key_path, public_path


def make_superexec_secret(folder: Path, force: bool = False) -> Path:
    """Make ``superexec.key``, the secret with which a separate ``flower-superexec`` authenticates at its SuperLink.

    Without a secret, anyone who can reach the SuperLink's port can take over the server side of the run.

    Raises
    ------
    ConfigError
        If others can read the folder, or the file exists and ``force`` is not set.
    """
    path = folder / "superexec.key"
    _prepare(folder, (path,), force)
    _write_private(path, secrets.token_hex(32).encode())
    return path


def main(arguments: list[str] | None = None) -> int:
    """Make the files that the command line asks for; return the exit code."""
    options = _parse_arguments(arguments)
    folder: Path = options.folder
    try:
        if not (options.host or options.ip or options.node):
            raise ConfigError("nothing to make; give --host or --ip for a server, --node for a node's key")
        made: list[Path] = []
        if options.host or options.ip:
            if not any((folder / name).exists() for name in ("ca.crt", "ca.key")):
                made += make_ca(folder)
            made += make_server_certificate(folder, options.host, options.ip, options.days, options.force)
            if not (folder / "superexec.key").exists():
                made.append(make_superexec_secret(folder))
        for name in options.node:
            made += make_node_key(folder, name, options.force)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for path in made:
        print(path)
    return 0


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fedmmkt certificates",
        description="Make a federation's certificates and keys. An existing CA is kept and used.",
    )
    parser.add_argument("folder", type=Path, help="folder of all files; created with mode 0700")
    parser.add_argument("--host", nargs="+", action="extend", default=[], help="the SuperLink's DNS names")
    parser.add_argument("--ip", nargs="+", action="extend", default=[], help="the SuperLink's addresses")
    parser.add_argument("--node", nargs="+", action="extend", default=[], help="nodes to make keys for")
    parser.add_argument(
        "--days", type=_positive, default=SERVER_DAYS, help="validity of the server's certificate (%(default)s)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing server certificate or node key; never the CA"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 36_500:
        raise argparse.ArgumentTypeError(f"{text} is not a number of days from 1 to 36500")
    return int(text)


def _checked_host(host: str) -> str:
    if re.fullmatch(r"[0-9.]+|[0-9A-Fa-f.:]*:[0-9A-Fa-f.:]*", host):
        raise ConfigError(f"host is {host!r}, which is an address; allowed there: DNS names; addresses go to --ip")
    if not _HOST.fullmatch(host):
        raise ConfigError(f"host is {host!r}; allowed: a DNS name without scheme, port or path")
    return host


def _checked_ip(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(ip)
    except ValueError:
        raise ConfigError(f"ip is {ip!r}; allowed: an IPv4 or IPv6 address without port") from None


def _prepare(folder: Path, files: Iterable[Path] = (), force: bool = False) -> None:
    """Make a private folder, or check an existing one; refuse to overwrite ``files`` unless ``force`` is set."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"folder {folder} has mode {mode:04o}, so that others may read keys in it; chmod 700 it")
    present = [str(path) for path in files if path.exists()]
    if present and not force:
        raise ConfigError(f"{' and '.join(present)} would be overwritten; --force replaces it")


def _load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}); make a CA first") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{certificate_path} or {key_path} is damaged: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{key_path} is not the key of {certificate_path}")
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = _now()
    builder = x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), now - _CLOCK_SKEW, now + datetime.timedelta(days=days)
    )
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(
    key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write_private(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # readable for others at no time
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)

    write_atomically(path, write)


def _write_public(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
