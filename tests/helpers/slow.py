"""The marker `slow`: what `bash scripts/test.sh` leaves out, and `bash scripts/test.sh --all` runs.

Only repetitions are slow: each kind of test has a smaller case that always runs (see tests/README.md).
"""

from collections.abc import Collection, Iterable
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

Case = TypeVar("Case")


def slow_but_for(always: Collection[Case], cases: Iterable[Case]) -> list[Case | ParameterSet]:
    """The cases of a parametrized test, all but a few of which are marked slow."""
    cases = list(cases)
    assert always and set(always) <= set(cases)
    return [case if case in always else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Case) -> tuple[object, ...]:
    return case if isinstance(case, tuple) else (case,)
