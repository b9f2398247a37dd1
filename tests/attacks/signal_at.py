"""A script that gets a signal at a given moment: `signal_at.py FROM MOMENT SIGNAL WHOM COUNT script words`.

The moment is a number of calls and returns of functions, Python's and C's, in the main thread since the first call of
the function FROM; 0: no signal. WHOM: itself, or its process group, as a terminal's Ctrl-C. The file COUNT gets how
many moments there were, and at which ones the first batch had come and the last step was done (`signals.hold` and
`release`). Several processes agree after each step.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import runtime.run
from runtime import signals

start, moment, number, whom, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
sys.argv = sys.argv[6:]
seen, marks = 0, {}


def watch(frame, event, _):
    global seen
    if not seen and not (event == "call" and frame.f_code.co_name == start):
        return
    seen += 1
    if frame.f_code.co_filename == signals.__file__:
        marks.setdefault(frame.f_code.co_name, seen)
    if seen == moment:
        sys.setprofile(None)
        if whom == "group":
            subprocess.run(
                ["kill", f"-{number}", "--", f"-{os.getpid()}"], start_new_session=True
            )  # from outside of it
        else:
            os.kill(os.getpid(), number)


os.setsid()
runtime.run.AGREED_EVERY = 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # who started this may ignore it
sys.setprofile(watch)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.setprofile(None)
    Path(count).write_text(json.dumps([seen, marks.get("hold"), marks.get("release")]))
