"""Hosts as network namespaces of Linux, and links between them that are slow and lose packets."""

import contextlib
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time

SERVER_ADDRESS = "10.77.0.1"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
PACKET = 65536


def node_address(index):
    return f"10.77.1.{index + 1}"


def inside(namespace):
    """Return the command that runs another in a namespace."""
    return ["ip", "netns", "exec", namespace]


def unavailable():
    """Say why there can be no namespaces here, or nothing."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if not shutil.which("ip"):
        return "there is no `ip` (iproute2)"
    name = f"fedmmkt-{os.getpid()}-probe"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    return ""


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def star(nodes, delay, loss):
    """Make a server and nodes that reach it over links of their own; give their namespaces and the links.

    Each direction of a link delays packets by ``delay`` seconds and loses the part ``loss`` of them: by the kernel's
    netem where it has that, else by `Wire`.
    """
    names = [f"fedmmkt-{os.getpid()}-{name}" for name in ("server", *(f"node-{index}" for index in range(nodes)))]
    links = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", names[0], "address", "add", f"{SERVER_ADDRESS}/32", "dev", "lo")
        link = Netem if has_netem(names[0]) else Wire
        for index, name in enumerate(names[1:]):
            links.append(link(names[0], f"to-node-{index}", name, "to-server", delay, loss))
            for end, device, own, other in (
                (name, "to-server", node_address(index), SERVER_ADDRESS),
                (names[0], f"to-node-{index}", None, node_address(index)),
            ):
                if own:
                    run("ip", "-n", end, "address", "add", f"{own}/32", "dev", device)
                run("ip", "-n", end, "link", "set", device, "up")
                source = ["src", SERVER_ADDRESS] if own is None else []
                run("ip", "-n", end, "route", "add", f"{other}/32", "dev", device, *source)
        yield names, links
    finally:
        for link in links:
            link.close()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def has_netem(namespace):
    try:
        run("tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except (OSError, subprocess.CalledProcessError):
        return False
    run("tc", "-n", namespace, "qdisc", "del", "dev", "lo", "root")
    return True


class Netem:
    """A pair of virtual Ethernet devices under the kernel's netem."""

    def __init__(self, one, device, other, other_device, delay, loss):
        self.ends = [(one, device), (other, other_device)]
        run("ip", "-n", one, "link", "add", device, "type", "veth", "peer", "name", other_device, "netns", other)
        for end, name in self.ends:
            run("tc", "-n", end, "qdisc", "add", "dev", name, "root", "netem", "delay", f"{delay * 1000:g}ms",
                "loss", f"{loss:%}")  # fmt: skip

    def counts(self):
        """Return how many packets were carried and lost."""
        said = [run("tc", "-s", "-n", end, "qdisc", "show", "dev", name).split() for end, name in self.ends]
        carried = sum(int(words[words.index("pkt") - 1]) for words in said)
        return carried, sum(int(words[words.index("(dropped") + 1].rstrip(",")) for words in said)

    def close(self):
        """Nothing to do: the devices go with their namespaces."""


class Wire:
    """Two TUN devices, and a thread that carries packets between them late, or not at all."""

    def __init__(self, one, device, other, other_device, delay, loss):
        self.ends = [tun(one, device), tun(other, other_device)]
        self.delay, self.loss = delay, loss
        self.carried = self.lost = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._carry, daemon=True)
        self.thread.start()

    def _carry(self):
        rng = random.Random(0)
        late = []  # (when it is due, number, to which end, packet)
        while not self.over.is_set():
            wait = max(0.0, late[0][0] - time.monotonic()) if late else 0.2
            for end in select.select(self.ends, [], [], min(wait, 0.2))[0]:
                with contextlib.suppress(OSError):
                    packet = os.read(end, PACKET)
                    if rng.random() < self.loss:
                        self.lost += 1
                        continue
                    self.carried += 1
                    target = self.ends[1 - self.ends.index(end)]
                    heapq.heappush(late, (time.monotonic() + self.delay, self.carried, target, packet))
            while late and late[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(late)
                with contextlib.suppress(OSError):
                    os.write(target, packet)

    def counts(self):
        """Return how many packets were carried and lost."""
        return self.carried, self.lost

    def close(self):
        self.over.set()
        self.thread.join()
        for end in self.ends:
            os.close(end)


def tun(namespace, device):
    """Make a TUN device, put it into a namespace, and return what reads and writes its packets."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    temporary = f"fm{os.getpid() % 100_000}{descriptor}"  # names of devices have at most 15 letters
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", temporary.encode(), IFF_TUN | IFF_NO_PI))
    run("ip", "link", "set", "dev", temporary, "netns", namespace, "name", device)
    return descriptor
