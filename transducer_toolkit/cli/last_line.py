# SPDX-License-Identifier: Apache-2.0
"""The last line that a command prints, also after an error or a signal."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any

_text: str | None = None


def set_last_line(text: str | None) -> None:
    """Set the line, or remove it with None."""
    global _text
    _text = text


def printed_at_the_end(main: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that prints the line after ``main``, however ``main`` ends.

    Ctrl-C ends it with exit status 130 and without a trace.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        set_last_line(None)
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None
        finally:
            if _text is not None:
                print(_text, flush=True)

    return wrapper
