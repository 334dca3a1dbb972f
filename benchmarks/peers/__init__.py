"""The other ways to compute the same product or layer: each gives calls to time, or says why it cannot run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], object]


class AbsentError(Exception):
    """A peer that cannot run here, or not at this shape; the text says why and, where that helps, what to install."""


def collect(makers: Mapping[str, Callable[..., Any]], *arguments: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Call each maker: ``(what they gave by name, the reasons of those that gave nothing)``.

    A peer that breaks is listed with its error like one that is missing: it must not end the run of the others.
    """
    found, absent = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make(*arguments)
        except AbsentError as reason:
            absent[name] = str(reason)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no text'}"
    return found, absent
