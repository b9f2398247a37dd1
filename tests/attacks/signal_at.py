"""A script that gets a signal at a given moment: `signal_at.py FROM MOMENT SIGNAL WHOM COUNT script words`.

The moment is a number of calls and returns of functions, Python's and C's, in the main thread since the first call of
the function FROM; 0: no signal. WHOM: itself, or its process group, as a terminal's Ctrl-C. The file COUNT gets how
many moments there were, and at which one the first batch was asked for. Several processes agree after each step.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import runtime.run

start, moment, number, whom, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
sys.argv = sys.argv[6:]
seen, first_batch = 0, None


def watch(frame, event, _):
    global seen, first_batch
    if not seen and not (event == "call" and frame.f_code.co_name == start):
        return
    seen += 1
    if first_batch is None and frame.f_code.co_name == "next":
        first_batch = seen
    if seen == moment:
        sys.setprofile(None)
        if whom == "group":
            os.killpg(0, number)
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
    Path(count).write_text(json.dumps([seen, first_batch]))
