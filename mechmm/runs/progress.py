"""How far a method is, in a terminal and in a notebook."""

from __future__ import annotations

import sys
import time
from html import escape
from types import TracebackType
from typing import Any

_WIDTH = 32


class Progress:
    """A bar that a method calls with (done, in all) of its work; see `progress`."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.since = time.monotonic()
        self.done, self.total = 0, 0
        self.shown = ""
        self.place: Any = None
        self.inside = False

    def __call__(self, done: int, total: int) -> None:
        if done < self.done:  # the next piece of work
            self.since = time.monotonic()
        self.done, self.total = done, total
        self._show()
        if done >= total and not self.inside:
            self._end()

    def __enter__(self) -> Progress:
        self.inside = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.inside = False
        self._end()

    @property
    def share(self) -> float:
        """Of the work that is done."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def text(self) -> str:
        """`patching 25%, 0:12 left`."""
        spent = time.monotonic() - self.since
        if self.done >= self.total > 0:
            return f"{self.label} 100%, took {_clock(spent)}"
        left = f", {_clock(spent / self.share - spent)} left" if self.share else ""
        return f"{self.label} {self.share:.0%}{left}"

    def _show(self) -> None:
        """What changed since the last time."""
        if self.text == self.shown:
            return
        self.shown = self.text
        if in_notebook():
            self._show_html()
        elif sys.stderr.isatty():
            full = round(_WIDTH * self.share)
            print(
                f"\r\x1b[K{'━' * full}{'─' * (_WIDTH - full)} {self.text}", end="", file=sys.stderr
            )

    def _show_html(self) -> None:
        # IPython is there where a notebook is.
        from IPython.display import HTML, display

        bar = f'<progress value="{self.share:.4f}" max="1" aria-label="{escape(self.label)}">'
        html = HTML(f"{bar}</progress> {escape(self.text)}")
        if self.place is None:
            self.place = display(html, display_id=True)
        else:
            self.place.update(html)

    def _end(self) -> None:
        """Leave the last state standing; where nothing can be overwritten, say it once."""
        if self.shown and not in_notebook():
            print("" if sys.stderr.isatty() else self.text, file=sys.stderr)
        self.shown, self.done = "", 0


def progress(label: str = "") -> Progress:
    """A progress bar for a method's `report=`: a bar in a notebook, a line on stderr elsewhere.

    Alone, it ends with the work: `mm.patch(..., report=mm.progress("patching"))`. As a context it
    ends there, too, where the work was interrupted: `with mm.progress("patching") as report: ...`.
    """
    return Progress(label)


def in_notebook() -> bool:
    """Whether this runs in Jupyter's kernel."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def _clock(seconds: float) -> str:
    """`0:05`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
