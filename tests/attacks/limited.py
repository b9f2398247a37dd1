"""Scripts one after another in one process that may take 2 GiB more than it does idle: what became of each.

limited.py commands.json outcomes.json      # of tests.processes.start_script
"""

import contextlib
import io
import json
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

LIMIT = 2 * 2**30  # bytes


def memory(name: str) -> int:
    """Bytes: VmSize, the address space; VmRSS, what is in RAM; VmHWM, the largest VmRSS."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def outcome(words: list[str], seconds: int) -> dict:
    """Exit status, stdout, stderr, and bytes of RAM beyond those at the start."""
    out, err, sys.argv, status = io.StringIO(), io.StringIO(), words, 0
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    idle, began = memory("VmRSS"), time.monotonic()
    signal.alarm(seconds)  # without a handler it ends this process, whatever it does
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    signal.alarm(0)
    took = {"seconds": time.monotonic() - began, "bytes": memory("VmHWM") - idle}
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), **took}


if __name__ == "__main__":
    commands, place = sys.argv[1:]
    limit = memory("VmSize") + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes = []
    for words in json.loads(Path(commands).read_text()):
        outcomes.append(outcome(words, 60))
        Path(place).write_text(json.dumps(outcomes))  # so that it is known how far it came
