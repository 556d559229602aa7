"""Metadata with one thing wrong, drawn at random: what stands in a file of JSON or YAML is gone, renamed, or odd."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

ODD = (
    *(None, True, -1, 0, 1, 3, 2**40, 10**30, 0.5, 1e300, float("nan"), float("inf")),
    *("", "x", "0:3", "v2.1", "2020-13-40", [], {}, [1], [float("nan")] * 3, {"a": 1}),
)


def places(content: Any, trail: tuple = ()) -> Iterator[tuple]:
    """Trails to all values inside of dicts and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*trail, key)
        yield from places(value, (*trail, key))


def mutate(content: Any, rng: np.random.Generator) -> None:
    """Lets one value of dicts and lists be gone, have another name, or be of another kind."""
    trails = list(places(content))
    *parts, last = trails[rng.integers(len(trails))]
    place = content
    for part in parts:
        place = place[part]
    what = rng.integers(4)
    if what == 0:
        del place[last]
    elif what == 1 and isinstance(place, dict):
        place[f"{last}_"] = place.pop(last)
    else:
        place[last] = copy.deepcopy(ODD[rng.integers(len(ODD))])
