"""Checks of the connections between hosts: certificates, keys, reachability, TLS, gRPC health, submitter's settings.

Each check returns a text with its result, or raises `ConfigError` with the problem and its solution.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import ssl
import stat
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedmmkt.common.config import ConfigError
from fedmmkt.deploy.processes import script, uncoloured

TIMEOUT = 10.0  # seconds, for a connection and for an answer
EXPIRES_SOON = datetime.timedelta(days=30)

# OpenSSL's verification results, from x509_vfy.h.
_UNKNOWN_ISSUER = {2, 18, 19, 20, 21}
_EXPIRED = {9, 10}
_OTHER_NAME = {62, 64}


def check_certificate(path: Path) -> str:
    """Check that a certificate can be read and is valid today, and for another 30 days."""
    certificate = _load_certificate(path)
    now, start, end = datetime.datetime.now(datetime.UTC), certificate.not_valid_before_utc, _end(certificate)
    if now < start:
        raise ConfigError(f"{path} is valid from {start:%Y-%m-%d %H:%M} UTC only; check this host's clock")
    if now > end:
        raise ConfigError(f"{path} expired on {end:%Y-%m-%d}; {_renewal(certificate)}")
    if now > end - EXPIRES_SOON:
        raise ConfigError(f"{path} expires on {end:%Y-%m-%d}, in {(end - now).days} days; {_renewal(certificate)}")
    return f"valid until {end:%Y-%m-%d}, SHA-256 {_fingerprint(certificate)}"


def check_signature(certificate: Path, authority: Path) -> str:
    """Check that a CA signed a certificate."""
    signed, ca = _load_certificate(certificate), _load_certificate(authority)
    try:
        signed.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(
            f"{certificate} is not signed by {authority} (SHA-256 {_fingerprint(ca)}); use the ca.crt of the folder "
            "in which the certificate was made, or make a certificate there"
        ) from None
    return f"signed by {authority}"


def check_names(certificate: Path, host: str) -> str:
    """Check that a server's certificate contains the host name or address that others use for the server."""
    try:
        extension = _load_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        raise ConfigError(f"{certificate} names no host; make one with fedmmkt certificates") from None
    hosts = extension.value.get_values_for_type(x509.DNSName)
    addresses = [str(address) for address in extension.value.get_values_for_type(x509.IPAddress)]
    _, dot, domain = host.partition(".")
    if not {host.lower(), f"*{dot}{domain}".lower()} & {name.lower() for name in (*hosts, *addresses)}:
        raise ConfigError(
            f"{certificate} does not name {host}, but {', '.join((*hosts, *addresses))}; add it: "
            "fedmmkt certificates FOLDER --host NAME ... --ip ADDRESS ... --force (all names anew)"
        )
    return f"names {host}"


def check_private(path: Path) -> str:
    """Check that this user can read a private key or secret, and nobody else can."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:04o}, so that others may use it; chmod 600 {path}")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{path} cannot be read by this user; run as the service's user, or chown it to that user")
    return f"{path} is for its owner only"


def check_pair(certificate: Path, key: Path) -> str:
    """Check that a private key belongs to a certificate."""
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{key} is no private key in PEM without password: {error}") from None
    if private.public_key() != _load_certificate(certificate).public_key():
        raise ConfigError(f"{key} is not the key of {certificate}; both come from one call of deploy.certificates")
    return f"{key} is the key of {certificate}"


def check_node_key(path: Path) -> str:
    """Check a SuperNode's key; only the SuperLink knows whether it is registered."""
    check_private(path)
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no private key of OpenSSH's format: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no elliptic-curve key; make one with fedmmkt certificates --node NAME")
    return (
        f"{path} fits. Whether it is registered only the SuperLink knows: a SuperNode that ends with 'code 2004' needs "
        f"'flwr supernode register {path.name}.pub CONNECTION' by who submits, or a minute's wait after a crash"
    )


def check_reachable(address: str) -> str:
    """Check that a process listens on an address."""
    host, port = split_address(address)
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except socket.gaierror:
        raise ConfigError(f"{host} is not known here; check the name, DNS or /etc/hosts") from None
    except ConnectionRefusedError:
        raise ConfigError(
            f"nothing listens on {address}; start the SuperLink there, on an address that others reach (not 127.0.0.1)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{address} cannot be reached ({error}); check the route and the firewall") from None
    return f"{address} answers"


def check_tls(address: str, authority: Path, is_grpc: bool = True) -> str:
    """Check that a server's certificate is signed by the given CA and contains the server's name.

    Parameters
    ----------
    address : str
        ``host:port``.
    authority : Path
        The CA's certificate.
    is_grpc : bool
        Whether the server should speak gRPC, as the Fleet API for nodes does; otherwise HTTP.
    """
    host, port = split_address(address)
    ca = _load_certificate(authority)
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection((host, port), TIMEOUT) as connection,
            context.wrap_socket(connection, server_hostname=host) as channel,
        ):
            found_grpc = channel.selected_alpn_protocol() == "h2"
            version = channel.version()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(_tls_advice(error, address, authority, ca)) from None
    except ssl.SSLError as error:
        raise ConfigError(
            f"{address} speaks no TLS ({error.reason}); is it the SuperLink, without --insecure?"
        ) from None
    except OSError as error:
        raise ConfigError(f"{address} cannot be reached ({error}); check the route and the firewall") from None
    if found_grpc != is_grpc:
        raise ConfigError(
            f"{address} speaks {'gRPC' if found_grpc else 'HTTP'}; nodes need the Fleet API's address (9092), who "
            "submits the SuperLink's --port (9091)"
        )
    return f"{address} has a certificate of this CA ({version})"


def is_healthy(address: str) -> bool:
    """Return whether a process reports over gRPC that it is serving (grpc.health.v1)."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def check_health(address: str) -> str:
    """Check that a SuperLink, SuperExec or SuperNode reports that it is serving."""
    split_address(address)
    if not is_healthy(address):
        raise ConfigError(
            f"{address} does not say that it serves; is it the process's --health-server-address, and does it run?"
        )
    return f"{address} serves"


def check_connection(name: str) -> str:
    """Check a submitter's connection: its settings, the CA, and whether the SuperLink answers."""
    path = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "config.toml"
    address, authority = read_connection(path, name)
    check_certificate(authority)
    check_reachable(address)
    check_tls(address, authority, is_grpc=False)
    command = [script("flwr"), "supernode", "list", name, "--format", "json"]
    environment = uncoloured(os.environ)
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=6 * TIMEOUT)
    answer = asked.stdout
    try:
        nodes = Counter(node["status"] for node in json.loads(answer)["nodes"])
    except (ValueError, KeyError):
        raise ConfigError(f"{address} does not answer as a SuperLink's --port does: {answer.strip()}") from None
    return f"{address} knows " + (", ".join(f"{count} {state}" for state, count in sorted(nodes.items())) or "no node")


def read_connection(path: Path, name: str) -> tuple[str, Path]:
    """Read the address and the path of the CA certificate of a connection in Flower's ``config.toml``.

    Raises
    ------
    ConfigError
        If there is no such connection, or it has no certificate.
    """
    try:
        connections = tomllib.loads(path.read_text(encoding="utf-8"))["superlink"]
        connection = connections[name]
        return connection["address"], Path(connection["root-certificates"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); write one, see docs/deployment.md") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except (KeyError, TypeError):
        raise ConfigError(
            f"{path} has no table [superlink.{name}] with 'address' and 'root-certificates'; see docs/deployment.md"
        ) from None


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port``; an IPv6 address is written in brackets.

    Raises
    ------
    ConfigError
        If the address does not have this form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"address is {address!r}; allowed: host:port without scheme")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _tls_advice(error: ssl.SSLCertVerificationError, address: str, authority: Path, ca: x509.Certificate) -> str:
    host, _ = split_address(address)
    if error.verify_code in _UNKNOWN_ISSUER:
        return (
            f"wrong CA: the certificate of {address} is not signed by {authority} (SHA-256 {_fingerprint(ca)}); "
            "copy the ca.crt of the SuperLink's host to this one"
        )
    if error.verify_code in _EXPIRED:
        return f"the certificate of {address} is out of date, or a clock is wrong; renew it on the SuperLink's host"
    if error.verify_code in _OTHER_NAME:
        return (
            f"the certificate of {address} does not name {host}; use a name that it has, or make one with "
            "--host or --ip for this one on the SuperLink's host"
        )
    return f"the certificate of {address} is refused: {error.verify_message}"


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise ConfigError(f"{path} is no certificate in PEM; copy it again from where it was made") from None


def _end(certificate: x509.Certificate) -> datetime.datetime:
    return certificate.not_valid_after_utc


def _fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()[:16]


def _renewal(certificate: x509.Certificate) -> str:
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if is_ca:
        return "make a new CA in a new folder, and give its ca.crt to every host"
    return "renew it: fedmmkt certificates FOLDER --host NAME ... --force, then restart the SuperLink"
