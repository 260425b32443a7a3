"""Processes that are killed while they do something."""

import os
import signal
import warnings


def run_in_a_killed_process(act):
    """Run a function in a forked process, and check that a kill ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill(*_, **__):
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)
