"""The errors under corruptions in a few numbers: means, mCE and relative mCE (Hendrycks and Dietterich 2019)."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from data.corruptions import BENCHMARK
from runtime import checkpoint
from runtime.errors import UserError

# Mean errors of AlexNet over the five severities of ImageNet-C, with which the published mCE is normalized
ALEXNET = dict(
    zip(
        BENCHMARK,
        (
            *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324),
            *(0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
        ),
    )
)
ALEXNET_CLEAN = 0.435  # table 1 of the paper


class Reference(NamedTuple):
    """The errors that others are compared with."""

    name: str
    clean: float
    errors: dict[str, float]  # of each corruption, the mean over severities


def mean_errors(rows: list[dict]) -> dict[str, float | None]:
    """{corruption: mean error over its severities}; None if one of them is not known."""
    errors: dict[str, list] = {}
    for row in rows:
        errors.setdefault(row["corruption"], []).append(row["error"])
    return {name: None if None in values else statistics.fmean(values) for name, values in errors.items()}


def mean_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def summary(clean: float | None, rows: list[dict], reference: Reference | None) -> dict[str, Any]:
    """Of the benchmark's corruptions among `rows` (each with corruption, severity, error):

    corrupted_error: the mean of their mean errors. degradation: the mean of what these are above the clean error.
    mce: the mean of error / the reference's. relative_mce: the mean of (error - clean) / the same of the reference.
    None without a reference, and the latter where the reference is no worse under a corruption than without.
    """
    errors = mean_errors(rows)
    own = {name: error for name, error in errors.items() if name in BENCHMARK}
    more = {name: None if error is None or clean is None else error - clean for name, error in own.items()}
    found: dict[str, Any] = {"clean_error": clean, "corrupted_error": mean_of([*own.values()])}
    found["degradation"] = mean_of([*more.values()])
    found |= {"mce": None, "relative_mce": None, "corruptions_in_mean": list(own)}
    if reference is not None:
        found["mce"] = mean_of([ratio(error, reference.errors[name]) for name, error in own.items()])
        pairs = [(value, reference.errors[name] - reference.clean) for name, value in more.items()]
        found["relative_mce"] = mean_of([ratio(value, others) for value, others in pairs])
    return found


def ratio(error: float | None, others: float) -> float | None:
    return None if error is None or others <= 0 else error / others


def find_reference(text: str | None, names: list[str], severities: list[int], measure: str) -> Reference | None:
    """`alexnet`, or the run whose eval_robustness/results.json (or which of these files) `text` names.

    Raises:
        UserError: there is none, or its errors are of other severities or of another kind.
    """
    if text is None:
        return None
    if text == "alexnet":
        if not measure.startswith("1 - top-1"):
            raise UserError(f"reference=alexnet has errors of classes, and here they are {measure}: name a run")
        if severities != [1, 2, 3, 4, 5]:
            raise UserError("reference=alexnet is known of all five severities together: remove severities")
        return Reference(text, ALEXNET_CLEAN, ALEXNET)
    path = Path(text)
    if path.is_dir():
        inner = path / "eval_robustness" / "results.json"  # a run folder has results of its own training too
        path = inner if inner.is_file() else path / "results.json"
    found = checkpoint.read_object(path) or {}
    try:
        severe, own = found["severities"], found["measure"]
        errors = {name: float(error) for name, error in found["errors"].items() if error is not None}
        reference = Reference(text, float(found["clean_error"]), errors)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"reference={text} has no results of task=robustness: give alexnet, or a run folder with "
            "eval_robustness/results.json"
        ) from None
    if severe != severities:
        raise UserError(f"reference={text} was measured at severities={severe}, not {severities}: make them equal")
    if own != measure:
        raise UserError(f"reference={text} has errors of another kind: {own}, here {measure}")
    if lacking := [name for name in names if name in BENCHMARK and name not in errors]:
        raise UserError(f"reference={text} has no error of {lacking[0]}: measure it there, or leave it out here")
    return reference
