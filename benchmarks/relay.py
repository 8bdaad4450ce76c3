"""A TCP relay that counts the bytes on the wire, including TLS and gRPC."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Relay:
    """The bytes from the server (down) and to the server (up) so far; nodes connect to ``address``."""

    address: str
    down: int = 0
    up: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, way: str, size: int) -> None:
        """Add bytes to a direction, ``down`` or ``up``."""
        with self._lock:
            setattr(self, way, getattr(self, way) + size)


@contextlib.contextmanager
def relay(server: str) -> Iterator[Relay]:
    """Listen on loopback and forward everything to ``server`` (host:port) and back, inside the block."""
    host, _, port = server.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        counted = Relay(f"127.0.0.1:{listener.getsockname()[1]}")
        threading.Thread(target=_accept, args=(listener, (host, int(port)), counted), daemon=True).start()
        yield counted


def _accept(listener: socket.socket, server: tuple[str, int], counted: Relay) -> None:
    while True:
        try:
            node, _ = listener.accept()
            upstream = socket.create_connection(server)
        except OSError:  # The block has ended, or the server is gone.
            return
        for source, target, way in ((node, upstream, "up"), (upstream, node, "down")):
            threading.Thread(target=_pass_on, args=(source, target, way, counted), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, way: str, counted: Relay) -> None:
    with contextlib.suppress(OSError), source, target:
        while content := source.recv(1 << 16):
            target.sendall(content)
            counted.count(way, len(content))
