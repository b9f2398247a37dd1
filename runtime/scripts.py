"""Scripts, ours and copied ones, for programs that run many of them: where a script is, its config, a run of it, which
ends when the program does."""

import contextlib
import importlib.util
import io
import multiprocessing
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Collection, Iterator
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime import config, signals
from runtime.errors import UserError, cut, explain
from runtime.files import unlock
from runtime.version import TOP, code_version

SWEEP = "SCAVENGE_SWEEP"  # environment variable: the process that runs a launcher, `<number> <where>`


def path_of(word: str) -> Path:
    """Where a script is: as named, or in this repository."""
    path = next((path for path in (Path(word), TOP / word) if path.is_file()), None)
    if path is None:
        raise UserError(f"there is no script {word}; name a file, or a script of this repository")
    return path.resolve()


def module_of(word: str) -> ModuleType:
    """The module of a script, imported once per process."""
    path = path_of(word)
    module = sys.modules.get(path.stem)
    if module is not None and getattr(module, "__file__", None) == str(path):
        return module
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{word} is not a Python file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[path.stem]
        raise UserError(f"{word} cannot be imported: {type(error).__name__}: {error}") from None
    if not hasattr(module, "main"):
        raise UserError(f"{word} has no main(argv), by which a sweep runs a script")
    return module


def schema_of(words: list[str]) -> type | None:
    """What the script's `schema(argv)` returns or, without one, its `Config`; None where it has neither."""
    script = module_of(words[0])
    return script.schema(words[1:]) if hasattr(script, "schema") else getattr(script, "Config", None)


def config_of(words: list[str]) -> dict | None:
    """The resolved config that a command line gives its script, which is not run; None of one without `schema_of`."""
    if (schema := schema_of(words)) is None:
        return None
    with contextlib.redirect_stderr(io.StringIO()):  # the options that a choice drops are reported when it runs
        return config.as_dict(config.load(schema, words[1:]))


class Running:
    """A command in a process of its own, which begins at once."""

    def __init__(self, words: list[str], launcher: str, server, environment: dict[str, str], log: Path | None = None):
        """
        Args:
            launcher: what the command is started with; empty: it is forked from `server`, a context of multiprocessing.
            environment: variables that this command sees in place of ours.
            log: file that gets its progress, after what is there; none: the terminal.

        Raises:
            UserError: there is no such script, or the launcher cannot be started.
        """
        words = [str(path_of(words[0])), *words[1:]]
        self.process: Any = None  # of subprocess or multiprocessing
        self.receive: connection.Connection | None = None  # what the latter sends
        self.error: str | None = None
        if launcher:
            sees = os.environ | environment | {SWEEP: f"{os.getpid()} {machine()}"}
            try:  # in a session of its own, or Ctrl-C would reach it twice, which torchrun cannot take
                command = [*shlex.split(launcher), *words]
                self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=sees)
            except (OSError, ValueError) as error:  # of shlex: a quotation mark that nothing closes
                why = getattr(error, "strerror", None) or error
                raise UserError(f"launcher={cut(launcher)} cannot be started: {why}") from None
            return
        self.receive, send = server.Pipe(duplex=False)
        self.process = server.Process(target=call_script, args=(words, send, environment, log))
        with signals.blocked():  # also the server, whose end would be taken for the command's
            self.process.start()
        send.close()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self) -> str | None:
        """Until it has ended; returns its error as one line, or None."""
        if self.receive is None:
            status = self.process.wait()
            self.error = f"exit status {status}; run it by itself to see why" if status else None
            return self.error
        if not self.receive.closed:
            try:
                self.error = self.receive.recv()
            except EOFError:  # killed before it could report anything
                self.process.join()
                self.error = f"the process died (exit code {self.process.exitcode}); out of memory?"
            self.process.join()
            self.receive.close()
        return self.error


def first_ended(running: Collection[Running]) -> Running:
    """Wait until one of the commands has ended, and return it. With a launcher there may be no others."""
    ended = next(iter(running))
    if len(running) > 1:
        ready = connection.wait([command.receive for command in running if command.receive])
        ended = next(command for command in running if command.receive in ready)
    ended.wait()
    return ended


@contextlib.contextmanager
def ends_with_all(running: Collection[Running]) -> Iterator[None]:
    """A SIGTERM or Ctrl-C that comes inside is passed on to all that are `running` by then, a SIGTERM at any other
    error, and raised once they have ended, a training after its step."""
    try:
        yield
    except BaseException as stopped:
        own = signal.SIGINT if isinstance(stopped, KeyboardInterrupt) else signal.SIGTERM
        for command in running:
            command.send_signal(getattr(stopped, "number", own))
        for command in running:
            command.wait()
        raise


def call_script(words: list[str], send, environment: dict[str, str], log: Path | None) -> None:
    """In a fresh process: `main` of the script, its errors sent back as one line."""
    error, sys.argv = None, words
    os.environ.update(environment)
    if (sweep := multiprocessing.parent_process()) and sweep.pid:
        end_with(sweep.pid)
    code_version(words[0])  # read before the script is, so that it is the version of what runs
    try:
        signals.listen()
        if log is not None:
            with open(log, "ab", buffering=0) as file:
                os.dup2(file.fileno(), sys.stderr.fileno())
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            module_of(words[0]).main(words[1:])
    except SystemExit as problem:
        error = f"exit status {problem.code}" if problem.code else None
    except (Exception, KeyboardInterrupt) as problem:
        error, _ = explain(problem)
        if error is None:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        error = error.removeprefix("error: ")
    signals.hold()
    unlock()
    send.send(error and " ".join(error.split()))


def end_with_sweep() -> None:
    """`end_with` the sweep whose launcher started this process, if that is on the same machine."""
    process, _, where = os.environ.get(SWEEP, "").partition(" ")
    if where and where == machine():
        end_with(int(process))


def machine() -> str:
    """Where a process's number means something: this start of this machine and, inside it, of its container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # another system than Linux
        return ""


def end_with(process: int) -> None:
    """Kill this process as soon as that one has ended, however it did: a killed sweep takes its cell along, under any
    launcher. Only Linux can do that."""
    if not hasattr(os, "pidfd_open"):
        return
    ended = select.poll()
    try:
        ended.register(os.pidfd_open(process), select.POLLIN)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except OSError:  # a container that forbids it
        return

    def wait() -> None:
        ended.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
