"""Cases of a table that are left to `make test-all`."""

from collections.abc import Iterable

import pytest


def leaving(slow: Iterable, cases: Iterable) -> list:
    """The cases for `parametrize`, those in `slow` marked; a tuple is one case's several arguments."""
    parts = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*p, marks=[pytest.mark.slow] * (c in slow)) for c, p in zip(cases, parts)]
