"""Where a process can die or be refused: before every call that changes the disk, and at any byte of a file.

Python tells an audit hook of every call that opens for writing, renames, deletes or makes something. In a forked child
the hook counts those under one folder and, at the n-th, kills the process (SIGKILL) or raises as a full disk does. What
native code writes is cut by the kernel's limit on the size of a file.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = bool(os.environ.get("TRIMTAB_FAULTS"))
"""Whether this is `make faults`."""
KILLED = -signal.SIGKILL
OUT_OF_BYTES = -signal.SIGXFSZ
SAID, RAISED = 2, 3
"""Exit codes of a child: a UserError, and anything else."""
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def inside(work: Callable[[], Any], limit: int | None = None, die: bool = True) -> int:
    """Runs `work` in a forked child: its exit code, or minus the signal that ended it.

    With `limit` no file may grow beyond so many bytes; what does kills the child, or raises if not `die`.
    """
    child = os.fork()
    if child == 0:
        _run(work, limit, die)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(work: Callable[[], Any], seconds: float) -> int:
    """Runs `work` in a forked child that gets SIGKILL after a time; its exit code as above."""
    child = os.fork()
    if child == 0:
        _run(work, None, True)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(work: Callable[[], Any], limit: int | None, die: bool) -> None:
    from trimtab.errors import UserError

    code = RAISED
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if die else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        work()
        code = 0
    except UserError:
        code = SAID
    finally:
        os._exit(code)  # nothing of pytest's may run in the child


class At:
    """Does something before the n-th change of the disk under a folder; counts the changes."""

    def __init__(self, folder: Path, number: int, act: Callable[[], None]):
        self.folder, self.number, self.act, self.count = str(folder), number, act, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changing = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changing = event in _CHANGES
        if not changing or not isinstance(arguments[0], str | os.PathLike):
            return
        if os.fspath(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.number:
                self.act()


def kill() -> None:
    """SIGKILL: no handler, no finally, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    """What a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def changes(work: Callable[[], Any], folder: Path) -> int:
    """How many changes of the disk under a folder `work` makes; they are made, in a child."""
    reading, writing = os.pipe()

    def counted() -> None:
        at = At(folder, 0, kill)
        work()
        os.write(writing, str(at.count).encode())

    assert inside(counted) == 0
    os.close(writing)
    found = int(os.read(reading, 20))
    os.close(reading)
    return found


def chosen(count: int, bounded: int) -> list[int]:
    """All of 1 … count in the long form, evenly spaced ones otherwise."""
    if LONG or count <= bounded:
        return list(range(1, count + 1))
    return sorted({1 + round(at * (count - 1) / (bounded - 1)) for at in range(bounded)})
