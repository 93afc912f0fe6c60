"""How a run ends: signals, readers that go away, workers that load data, and one run in a folder at a time.

However it ends, the state is whole: a stop that was asked for waits for the end of a step, and what may fail by itself,
the next batch, is had before the step begins.
"""

import atexit
import contextlib
import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# Ctrl-C, a polite kill, a terminal that closes (not on Windows)
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupt:
    """A signal, or an output that nobody reads any more, asks the loop to save and stop at the end of the step; a
    second Ctrl-C stops at once. What `nohup` ignores stays ignored."""

    def __init__(self):
        self.signalled, self.before = False, {}
        for number in STOP_SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)

    @property
    def asked(self) -> bool:
        return self.signalled or Output.gone

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame) -> None:
        # Others than a hand on a keyboard often send a signal twice: to the group, and to each process of it.
        if self.signalled and number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signalled = True


class DataFailed(ValueError):
    """No next batch can be had. The step before is whole, so it can be saved."""


def without_alarm(loader) -> Iterator:
    """The batches of a loader without torch's alarm for a worker that dies: it may ring in the middle of a step.

    Its death is noticed all the same, within seconds, where its next batch is waited for.
    """
    alarms = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before, batches = alarms and signal.getsignal(signal.SIGCHLD), iter(loader)
    if alarms:
        signal.signal(signal.SIGCHLD, before)
    return batches


def in_worker(_: int) -> None:
    """In a process that loads data: whoever stops the run stops the process that trains, which ends this one."""
    for lock in LOCKS:
        os.close(lock)  # else the folder stays locked until the workers of a killed run have ended
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """What is left of them at the end: they ignore multiprocessing's SIGTERM, which would wait for them for ever."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class Output:
    """Standard output or error whose reader may go away (`| head`, a closed terminal): that nobody listens is no error.

    What is said from then on goes nowhere, and a run that trains saves and stops, see Interrupt.
    """

    gone = False  # whether a reader of this process has gone

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        if "\n" in text:  # a reader behind a pipe sees each line when it is said
            self.flush()
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, do, *what) -> None:
        try:
            do(*what)
        except OSError as error:
            Output.gone |= error.errno in (errno.EPIPE, errno.EIO, errno.EINVAL)  # and not where a disk is full
            with open(os.devnull, "w") as nobody:
                os.dup2(nobody.fileno(), self.stream.fileno())


@contextlib.contextmanager
def sole_run(folder: str | Path):
    """Around a command that trains: a second one in the same run folder is refused, as each would write over the other.

    The lock is on the folder itself and ends with the process, however that ends; on Windows there is none.
    """
    if fcntl is None or int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    LOCKS.append(os.open(folder, os.O_RDONLY))
    try:
        try:
            fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # others than this one: a file system without locks
            if isinstance(error, BlockingIOError):
                raise ValueError(f"another process is training in {folder}: wait for it, or change --out") from error
        yield
    finally:
        os.close(LOCKS.pop())
        with contextlib.suppress(OSError):  # nothing was written
            os.rmdir(folder)


LOCKS: list[int] = []  # open folders of sole_run
