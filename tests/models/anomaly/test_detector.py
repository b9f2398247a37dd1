"""What a detector's class declares is what it has: the scripts ask the class and never look for methods."""

import pytest
from torch import nn

from models.anomaly import DETECTORS
from models.anomaly.detector import Detector


@pytest.mark.parametrize("name", DETECTORS)
def test_a_class_declares_what_it_has(name):
    kind = DETECTORS[name]
    assert kind.fits == hasattr(kind, "fit")
    assert kind.updates == hasattr(kind, "add") == hasattr(kind, "keep")
    assert kind.by_gradient == (kind.forward is not nn.Module.forward)
    assert kind.fits or kind.by_gradient
    assert kind.learns_from == "train" or kind.by_gradient
    assert not kind.leaves_out or kind.fits


def test_the_base_class_declares_nothing():
    assert not (Detector.fits or Detector.updates or Detector.by_gradient or Detector.leaves_out)
