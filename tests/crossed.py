"""Parametrization of which the quick suite runs a part, and test-full the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest


def crossed(names: str, *axes: Sequence[object], through: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrize ``names`` with every combination of ``axes``, each value of which the quick suite has once at least; the others are test-full's.

    ``through`` are the names that fixtures make of their values.
    """
    longest = max(len(axis) for axis in axes)
    quick = {tuple(i % len(axis) for axis in axes) for i in range(longest)}
    places = itertools.product(*(range(len(axis)) for axis in axes))
    params = []
    for place in places:
        values = [axis[i] for axis, i in zip(axes, place, strict=True)]
        params.append(pytest.param(*values, marks=() if place in quick else pytest.mark.full))
    return pytest.mark.parametrize(names, params, indirect=list(through))


def first(name: str, values: Sequence[object], *, through: bool = False) -> pytest.MarkDecorator:
    """Parametrize ``name`` with ``values``; the quick suite runs the first, test-full the others."""
    params = [pytest.param(value, marks=pytest.mark.full if i else ()) for i, value in enumerate(values)]
    return pytest.mark.parametrize(name, params, indirect=through)
