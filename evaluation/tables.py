"""Tables of results: Markdown for people, CSV for programs."""

import csv
import io


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns also line up on a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[text.ljust(width) for text, width in zip(row, widths)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def with_interval(results: dict, key: str) -> str:
    """`0.943 [0.912, 0.968]`; a dash where the metric is undefined."""
    if results.get(key) is None:
        return "-"
    interval = results.get(f"{key}_interval")
    text = f"{results[key]:.3f}"
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"


def csv_table(rows: list[dict]) -> str:
    """CSV with every key that a row has, in order of first appearance."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
