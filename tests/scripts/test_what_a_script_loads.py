"""Rooms that do not know each other: what importing a script loads beside itself."""

import subprocess
import sys

import pytest

from tests.images import TOP


@pytest.mark.parametrize(
    ("script", "rooms"),
    [
        ("train_ssl", ["models.anomaly"]),
        pytest.param("train_anomaly", ["models.ssl"], marks=pytest.mark.slow),
        pytest.param("eval", ["models.anomaly"], marks=pytest.mark.slow),
        pytest.param("train_classifier", ["models.ssl", "models.anomaly"], marks=pytest.mark.slow),
    ],
)
def test_a_script_does_not_load_the_other_ones_methods(script, rooms):
    program = f"import {script}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=TOP, capture_output=True, text=True, check=True)
    names = loaded.stdout.split()
    assert script in names and [name for name in names for room in rooms if f"{name}.".startswith(f"{room}.")] == []
