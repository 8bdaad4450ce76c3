"""Check a deployment from any of its hosts; each line says ``ok``, or the problem and its solution.

Only the parts that the options name are checked. On a SuperNode's host::

    fedmmkt doctor --ca ca.crt --superlink HOST:9092 --node-key node.key --node-config 'data-path="/data" ...'

On the SuperLink's host, use ``--certificate``, ``--host`` and ``--t2i``. On a submitter's host, use ``--connection``.
Before a simulation, use ``--data`` and ``--t2i``.
The exit code is 1 if a check fails, and 2 if the command line cannot be read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from fedmmkt.common.config import ConfigError, NodeConfig
from fedmmkt.deploy.connection_checks import (
    check_certificate,
    check_connection,
    check_health,
    check_names,
    check_node_key,
    check_pair,
    check_private,
    check_reachable,
    check_signature,
    check_tls,
)
from fedmmkt.deploy.host_checks import (
    check_data,
    check_dataset,
    check_disk,
    check_folder,
    check_ledger,
    check_model,
    check_t2i,
    check_versions,
)
from fedmmkt.deploy.processes import QUIET_LIBRARIES

Check = tuple[str, Callable[[], str]]


def planned_checks(options: argparse.Namespace) -> Iterator[Check]:
    """Yield a name and a function for each check that the options ask for.

    Raises
    ------
    ConfigError
        If the run-config or node-config cannot be read.
    """
    yield "versions", check_versions
    for path in filter(None, (options.ca, options.certificate)):
        yield "certificate", partial(check_certificate, path)
    if options.certificate and options.ca:
        yield "CA", partial(check_signature, options.certificate, options.ca)
    for host in options.host:
        yield "names", partial(check_names, options.certificate, host)
    for path in options.key:
        yield "private", partial(check_private, path)
    if options.certificate and options.certificate_key:
        yield "private", partial(check_private, options.certificate_key)
        yield "key", partial(check_pair, options.certificate, options.certificate_key)
    if options.node_key:
        yield "node key", partial(check_node_key, options.node_key)
    for address in options.superlink:
        yield "reachable", partial(check_reachable, address)
        if options.ca:
            yield "TLS", partial(check_tls, address, options.ca)
    for address in options.health:
        yield "health", partial(check_health, address)
    if options.connection:
        yield "connection", partial(check_connection, options.connection)
    yield from _config_checks(options)
    for folder in options.folder:
        yield from _folder_checks(folder, options.free)


def examine(checks: Iterable[Check]) -> bool:
    """Run the checks and print a line for each; return whether all passed."""
    well = True
    for name, check in checks:
        try:
            print(f"ok    {name}: {check()}", flush=True)
        except (ConfigError, OSError) as error:
            well = False
            print(f"WRONG {name}: {error}", flush=True)
    return well


def main(arguments: list[str] | None = None) -> int:
    """Run the checks that the command line asks for; return the exit code."""
    options = _parse_arguments(arguments)
    os.environ.update({**QUIET_LIBRARIES, **os.environ})
    try:
        checks = list(planned_checks(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if examine(checks) else 1


def _config_checks(options: argparse.Namespace) -> Iterator[Check]:
    """Yield the checks of a run-config and a node-config."""
    if not (options.run_config or options.node_config or options.t2i or options.data):
        return
    from fedmmkt.client_app.memory import DEFAULT_FOLDER  # These import torch, which a health check does not need.
    from fedmmkt.deploy.run_config_text import parse_run_config
    from fedmmkt.deploy.settings import right_part, with_earlier

    config, wrong = right_part(with_earlier(parse_run_config(options.run_config)))
    if wrong:  # The others are checked all the same.
        yield "run-config", partial(_raise, wrong)
    if options.data:
        yield "dataset", partial(check_dataset, config)
    if options.t2i:
        yield "T2I model", partial(check_t2i, config)
    if not options.node_config:
        return
    node_config = parse_run_config([options.node_config])
    try:
        node = NodeConfig.from_flower(node_config)
        if not node.data_path:
            raise ConfigError("node-config key 'data-path' is missing; only a simulation gives nodes partitions")
    except ConfigError as error:
        yield "node-config", partial(_raise, error)
        return
    yield "model", partial(check_model, config, node)
    yield "data", partial(check_data, config, node)
    state = Path(node.state_dir or DEFAULT_FOLDER).expanduser()
    if node.privacy_ledger:
        yield "privacy ledger", partial(check_ledger, Path(node.privacy_ledger), state)
    yield from _folder_checks(state, options.free)


def _raise(error: ConfigError) -> str:
    raise error


def _folder_checks(folder: Path, least: float) -> Iterator[Check]:
    yield "folder", partial(check_folder, folder)
    yield "disk", partial(check_disk, folder, least)


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fedmmkt doctor",
        description="Check a deployment from any of its hosts; only the parts that the options name are checked.",
    )
    parser.add_argument("--ca", type=Path, metavar="FILE", help="the CA's certificate, ca.crt")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="the SuperLink's certificate, server.pem")
    parser.add_argument("--certificate-key", type=Path, metavar="FILE", help="its private key, server.key")
    parser.add_argument("--host", nargs="+", default=[], help="names and addresses that the certificate must have")
    parser.add_argument("--key", nargs="+", type=Path, default=[], metavar="FILE", help="other private files")
    parser.add_argument("--node-key", type=Path, metavar="FILE", help="a SuperNode's private key")
    parser.add_argument("--superlink", nargs="+", default=[], metavar="HOST:PORT", help="the SuperLink's APIs")
    parser.add_argument("--health", nargs="+", default=[], metavar="HOST:PORT", help="health servers, without TLS")
    parser.add_argument("--connection", metavar="NAME", help="a connection in Flower's config.toml, to submit runs")
    parser.add_argument("--node-config", metavar="PAIRS", help="the node-config: data, model, state folder")
    parser.add_argument("--run-config", action="append", default=[], metavar="PAIRS", help="changes to the run-config")
    parser.add_argument("--data", action="store_true", help="read the run's dataset, as a simulation does")
    parser.add_argument("--t2i", action="store_true", help="load the run's T2I model")
    parser.add_argument("--folder", nargs="+", type=Path, default=[], help="private folders of the service")
    parser.add_argument("--free", type=float, default=2.0, metavar="GIB", help="required free disk space (%(default)s)")
    options = parser.parse_args(arguments)
    if (options.host or options.certificate_key) and not options.certificate:
        parser.error("--host and --certificate-key need --certificate")
    return options


if __name__ == "__main__":
    sys.exit(main())
