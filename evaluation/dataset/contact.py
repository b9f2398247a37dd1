"""A contact sheet of each class: images spread evenly over it."""

import numpy as np

from evaluation.dataset.inspection import Inspected, tile
from evaluation.dataset.section import Gallery, Section

SHOWN, SIDE, CLASSES = 16, 112, 60  # images of a class, pixels of their longer side, and classes


def contact_sheets(splits: dict[str, Inspected]) -> Section:
    """Of each class the images of all splits together, test after train."""
    by_kind: dict[str, list[tuple[str, int]]] = {}
    for name, split in splits.items():
        kinds = split.kinds
        for i in split.readable.tolist():
            by_kind.setdefault(kinds[i], []).append((name, i))
    parts: list = []
    if len(by_kind) > CLASSES:
        parts.append(f"Of the first {CLASSES} of {len(by_kind):,} classes.")
    for kind in sorted(by_kind, key=lambda kind: (kind != "good", kind))[:CLASSES]:
        images = by_kind[kind]
        chosen = [images[k] for k in np.unique(np.linspace(0, len(images) - 1, SHOWN).round().astype(int))]
        tiles = [(splits[name].names[i], tile(splits[name].dataset, i, SIDE)) for name, i in chosen]
        parts.append(Gallery(kind, tiles, f"{len(chosen)} of {len(images):,} images"))
    return Section("contact_sheets", "Images of each class", {"classes": len(by_kind)}, parts=parts)
