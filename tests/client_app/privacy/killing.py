"""A process that kills itself before one of its writes."""

import os
import signal


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
