"""Child processes that never outlive their parent.

hivemind forks a process for its DHT and for every averager, and its DHT starts the libp2p daemon `p2pd`. When the
program is killed with SIGKILL they would live on, hold its port, and answer other peers in its name. Linux can send a
signal to a child when its parent dies (`prctl(2)`, PR_SET_PDEATHSIG).
"""

import ctypes
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import psutil
import torch

from kantha.errors import ProcessEndedError

_PR_SET_PDEATHSIG = 1
_RESTARTS, _MOST_RESTARTS = "KANTHA_RESTARTS", 3  # the environment variable that counts them
_libc = ctypes.CDLL(None, use_errno=True)


def signal_when_parent_dies(signum: signal.Signals) -> None:
    """Ask the kernel to send `signum` to this process when the thread that forked it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


@functools.cache  # hooks cannot be taken back; one is enough
def prepare_forks() -> None:
    """From now on, every process that this one forks is killed when this one dies, and can use PyTorch from threads."""
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    gc.freeze()  # what came from the parent is the parent's; to look through it takes a second each time
    signal_when_parent_dies(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the program's own handler is for the program
    # PyTorch rebuilds its thread pool at the first use after a fork, and two threads that are first at once crash
    # ("Invalid thread pool!"): be first while there is only one. The forked averagers need no second core.
    torch.set_num_threads(1)


def end_with_children_when_parent_dies() -> None:
    """For a forked process with children of its own: when the parent dies or asks by SIGTERM, end them, then itself."""

    def end(_signum: int, _frame: object) -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal_when_parent_dies(signal.SIGTERM)


def leave_terminal_group() -> None:
    """Move this process to a group of its own, so that Ctrl-C in a terminal reaches the program and not this child."""
    os.setpgid(0, 0)


def start_again(error: ProcessEndedError, say: Callable[[str], None]) -> NoReturn:
    """Replace this program, which has closed what it held, by a fresh one. Raises `error` when it has done so often.

    New helpers cannot be forked safely from a program that has threads and perhaps a GPU.
    """
    restarts = int(os.environ.get(_RESTARTS, "0"))
    if restarts >= _MOST_RESTARTS:
        raise error
    say(f"{error}: starting again …")
    os.environ[_RESTARTS] = str(restarts + 1)
    os.execv(sys.executable, [sys.executable, "-m", "kantha", *sys.argv[1:]])
