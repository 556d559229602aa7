"""Checks of values, which only a host can read: in a compiled graph they are assertions, for which no device waits."""

from collections.abc import Callable

import torch


def require(valid: torch.Tensor, rule: str, error: Callable[[], str]) -> None:
    """ValueError(`error()`) unless all of `valid`, bool of any shape, are true; in a compiled graph, which can tell no
    values, RuntimeError(`rule`).
    """
    if torch.compiler.is_compiling():
        torch._assert_async(valid.all(), rule)
    elif not bool(valid.all()):
        raise ValueError(error())


def unless_all(mask: torch.Tensor | None) -> torch.Tensor | None:
    """`mask`, or None where it masks nothing, for which attention is faster. A compiled graph takes what it is given:
    leave out there what masks nothing.
    """
    if mask is None or torch.compiler.is_compiling() or not bool(mask.all()):
        return mask
    return None
