"""How many images there are of each class and split, what they are, and which cannot be read."""

from collections import Counter

import numpy as np

from evaluation.dataset.inspection import Inspected, bare_reason
from evaluation.dataset.section import Chart, Problem, Section, Table, count
from plots.bars import bars_svg
from runtime.text import first_few

MOST_ROWS = 50  # of a table in the report; images.csv has all
UNEQUAL = 10  # the largest class has so many times the images of the smallest


def counts(splits: dict[str, Inspected], missing: dict[str, str]) -> Section:
    """Images of each class (of anomaly sets: good and each defect) and split."""
    by_split = {name: Counter(split.kinds) for name, split in splits.items()}
    declared = [kind for s in splits.values() if s.dataset.defects is None for kind in s.dataset.classes]
    found = sorted({kind for counter in by_split.values() for kind in counter}, key=lambda kind: (kind != "good", kind))
    kinds = list(dict.fromkeys([*declared, *found]))
    totals = {kind: sum(counter[kind] for counter in by_split.values()) for kind in kinds}
    problems = [
        Problem("warning" if name in ("train", "test") else "note", f"no split {name}: {why}")
        for name, why in missing.items()
    ]
    for name, counter in by_split.items():
        dataset, learned = splits[name].dataset, by_split.get("train", Counter())
        if dataset.defects is None and (empty := [kind for kind in dataset.classes if not counter[kind]]):
            problems.append(Problem("warning", f"{name} has no image of {first_few(empty, 5)}"))
        if name == "train" and len(learned) > 1 and max(learned.values()) >= UNEQUAL * min(learned.values()):
            (large, most), (small, least) = learned.most_common()[0], learned.most_common()[-1]
            text = f"classes are of unequal size: train has {count(most, 'image')} of {large}, {least:,} of {small}"
            problems.append(Problem("warning", f"{text} (data.balanced=true shows each class equally often)"))
    rest = [
        [name, f"{number:,}", why]
        for name, split in splits.items()
        for why, number in split.dataset.left_out.items()
        if number
    ]
    numbers = {name: {kind: counter[kind] for kind in kinds if counter[kind]} for name, counter in by_split.items()}
    shown = kinds if len(kinds) <= MOST_ROWS else sorted(kinds, key=lambda kind: -totals[kind])
    if len(kinds) > MOST_ROWS:
        shown = shown[: MOST_ROWS // 2] + shown[-MOST_ROWS // 2 :]
    rows = [[kind, *(f"{counter[kind]:,}" for counter in by_split.values())] for kind in shown]
    sums = ["all", *(f"{len(split.dataset):,}" for split in splits.values())]
    parts: list = [Table(["class", *splits], [*rows, sums])]
    if len(kinds) > MOST_ROWS:
        parts.insert(0, f"The {MOST_ROWS // 2} largest and {MOST_ROWS // 2} smallest of {len(kinds):,} classes.")
    elif len(kinds) > 1:
        bars = {kind: [counter[kind] for counter in by_split.values()] for kind in kinds}
        parts.insert(0, Chart(bars_svg("Images of each class", bars, list(splits))))
    if rest:
        parts.append(
            Table(["split", "images", "reason"], rows=rest, title="Images that are not in a split", texts=True)
        )
    return Section("counts", "Classes", numbers, problems, parts)


def files(splits: dict[str, Inspected]) -> Section:
    """Sizes in pixels and bytes, modes and formats."""
    numbers: dict = {}
    rows = []
    for name, split in splits.items():
        seen = split.rows[split.readable]
        if not len(seen):
            continue
        sides = np.stack([seen["height"], seen["width"]], 1)  # (N, 2)
        sizes = Counter(map(tuple, sides.tolist()))
        common = [{"height": h, "width": w, "images": n} for (h, w), n in sizes.most_common(5)]
        about = {
            "smallest": sides.min(0).tolist(),
            "median": np.median(sides, 0).tolist(),
            "largest": sides.max(0).tolist(),
            "sizes": len(sizes),
            "most_common": common,
            "modes": _counted(seen["mode"]),
            "formats": _counted(seen["format"]),
            "gray_stored_as_color": int((seen["gray"] & np.isin(seen["mode"], [b"RGB", b"RGBA", b"P"])).sum()),
            "bytes": sum(dict(zip(split.dataset.paths, split.rows["bytes"].tolist())).values()),  # each file once
        }
        numbers[name] = about
        first = common[0]
        usual = f"{_size(first['height'], first['width'])} ({first['images'] / len(seen):.0%})"
        ends = [_size(*about[key]) for key in ("smallest", "median", "largest")]
        kinds = [", ".join(f"{n:,} {kind}" for kind, n in about[key].items()) for key in ("modes", "formats")]
        rows.append([name, *ends, usual, f"{len(sizes):,}", *kinds, f"{about['bytes'] / 2**20:,.1f}"])
    header = ["split", "smallest", "median", "largest", "most common", "sizes", "modes", "formats", "MiB"]
    problems = []
    all_gray = all(split.rows["gray"][split.readable].all() for split in splits.values())
    if all_gray and any(about["gray_stored_as_color"] for about in numbers.values()):
        text = "no image has colors, though files are stored in color: data.gray=true takes a third of the memory"
        problems.append(Problem("note", text))
    modes = {mode for about in numbers.values() for mode in about["modes"]}
    if len({mode.startswith(("I", "F")) for mode in modes}) > 1:
        problems.append(Problem("warning", f"files of 8 and of more bits in one set: {', '.join(sorted(modes))}"))
    about_sizes = "Height x width in pixels, each of the two by itself for smallest, median and largest."
    return Section("files", "Sizes and formats", numbers, problems, [about_sizes, Table(header, rows)])


def broken(splits: dict[str, Inspected]) -> Section:
    """Files that cannot be read, by name and with the reason."""
    found = []
    for name, split in splits.items():
        found += [(name, split.names[i], why) for i, why in sorted(split.broken.items())]
        root = split.dataset.root
        left_out = sorted(split.dataset.unreadable.items())  # threads filled it in any order
        found += [(name, path.removeprefix(f"{root}/"), bare_reason(why, path)) for path, why in left_out]
    number = Counter(name for name, _, _ in found)
    problems = [Problem("error", f"{count(n, 'image')} of {name} cannot be read") for name, n in number.items()]
    parts: list = ["All images can be read."]
    if found:
        parts = [Table(["image", "split", "reason"], [[path, name, why] for name, path, why in found[:MOST_ROWS]],
                       texts=True)]  # fmt: skip
        if len(found) > MOST_ROWS:
            parts.append(f"The first {MOST_ROWS} of {len(found):,}; results.json has all.")
    entries = [{"split": name, "image": path, "reason": why} for name, path, why in found]
    return Section("broken", "Broken files", {"count": len(found), "files": entries}, problems, parts)


def _counted(column: np.ndarray) -> dict[str, int]:
    return {value.decode(): number for value, number in Counter(column.tolist()).most_common()}


def _size(height: float, width: float) -> str:
    return f"{height:g} x {width:g}"
