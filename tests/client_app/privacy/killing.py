"""A process that kills itself before one of its writes."""

import os
import signal
import sys

WRITES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}  # Python's events.


def killing_at(number):
    """Return what wraps functions, so that the process is killed before their call of this number, all together."""
    calls = 0

    def counted(call):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    return counted


def torn(write):
    """Return `os.write` that writes a part alone, so that a kill before the next write leaves a torn line."""
    return lambda descriptor, data: write(descriptor, data[: max(1, len(data) // 2)])


def kill_at_write(number, *others):
    """Kill this process before its write of this number: whatever it opens to write, writes, flushes, moves or removes.

    Python tells of all but what libraries write by themselves; these are given as modules and names of functions.
    """
    counted = killing_at(number)
    os.write, os.fsync = counted(torn(os.write)), counted(os.fsync)
    for module, name in others:
        setattr(module, name, counted(getattr(module, name)))
    count = counted(lambda: None)

    def heard(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes or event in WRITES:
            count()

    sys.addaudithook(heard)
