"""Cases of which a part runs by default, and all with `-m ''`: compiling them takes the time."""

import pytest


def one_in(n, cases):
    """The cases, all but every n-th of them marked as slow."""
    slow = pytest.mark.slow
    return [pytest.param(case, marks=slow if i % n else ()) for i, case in enumerate(cases)]
