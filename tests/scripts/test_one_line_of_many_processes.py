"""Under torchrun every cause of an end has one line, whichever processes it strikes, and nobody waits for the dead."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from data.datasets.folder import ClassFolder
from data.loading import Loader
from tests.images import TOP, command, write_classes
from tests.scripts.test_train_ssl import words

BUG = """
import sys
from runtime import distributed, errors
def main(argv):
    distributed.setup("cpu")
    if distributed.rank() == 1:
        raise {raised}
    distributed.barrier()
errors.run(main)
"""


def end_of(words: list[str]) -> tuple[int, list[str], str]:
    """Exit status, lines that are an error or a traceback of ours, and all of stderr; torchrun's own report is left."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    began = time.monotonic()
    done = subprocess.run(
        command(words, processes=2), cwd=TOP, capture_output=True, text=True, env=environment, check=False, timeout=240
    )
    assert time.monotonic() - began < 200  # not the half hour of a collective's patience
    ours = done.stderr.split("torch/distributed/elastic/")[0]
    lines = [line for line in ours.splitlines() if line.startswith("error") or "Traceback" in line or "Error:" in line]
    return done.returncode, lines, done.stderr


@pytest.mark.slow
def test_a_mistake_that_all_processes_see(tmp_path):
    status, lines, everything = end_of(["train_ssl.py", "configs/demo/simclr_demo.yaml", "epoch=3", f"runs={tmp_path}"])
    assert status != 0 and lines == ["error: unknown key 'epoch', did you mean 'epochs'?"]
    assert everything.count("did you mean") == 1 and "exitcode  : 2" in everything


@pytest.mark.slow
def test_a_broken_image_that_one_process_sees_after_some_steps(tmp_path):
    images = write_classes(tmp_path / "images")
    more = ["data.cache=none", "data.workers=0", "holdout=0", "epochs=2", "save.every=2"]
    dataset = ClassFolder("train", 36, root=str(images))
    order = next(Loader(dataset, 36, "cpu", shuffle=True).epoch(0))[2]  # of one process: global batches of 8
    broken = Path(dataset.paths[int(order[3 * 8 + 6])])  # the fourth step's, and of rank 1's half
    broken.write_bytes(broken.read_bytes()[:-500])  # its size can be read
    status, lines, everything = end_of(["train_ssl.py", *words("simclr", images, tmp_path / "runs", *more)])
    assert status != 0 and len(lines) == 1 and lines[0].startswith(f"error: cannot read image {broken}"), everything
    assert torch.load(tmp_path / "runs" / "run" / "last.pt", weights_only=True)["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("errors.UserError('only here')", ["error: only here"]),
        (
            "SystemExit(7)",
            ["error: another process of this run died without an error message; did it run out of memory?"],
        ),
        ("KeyError('bug')", ["Traceback (most recent call last):", "KeyError: 'bug'"]),
    ],
)
def test_one_process_ends_and_the_other_waits_in_a_collective(raised, expected, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BUG.format(raised=raised))
    status, lines, everything = end_of([str(script)])
    assert status != 0
    assert lines == expected or ("SystemExit" in raised and lines == []), everything  # torchrun may have been faster
