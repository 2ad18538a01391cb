"""Progress is told in terminals, in files and in notebooks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import mechmm as mm


def test_a_file_gets_one_line_a_piece_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    report = mm.progress("patching")
    for done in range(1, 5):
        report(done, 4)
    assert capsys.readouterr().err == "patching 100%, took 0:00\n"


def test_an_interrupted_context_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), mm.progress("patching") as report:  # noqa: PT012
        report(1, 4)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("patching 25%")
    with mm.progress("nothing"):
        pass
    assert capsys.readouterr().err == ""


def test_a_context_that_counts_twice_ends_once(capsys: pytest.CaptureFixture[str]) -> None:
    with mm.progress("lens") as report:
        for done, total in ((2, 2), (1, 3), (3, 3)):
            report(done, total)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_terminal_gets_a_bar_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = mm.progress("patching")
    report(1, 4)
    report(4, 4)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    first, second = shown.split("\r\x1b[K")[1:]
    assert "━" * 8 + "─" * 24 + " patching 25%" in first
    assert "━" * 32 + " patching 100%" in second


def test_a_notebook_gets_one_bar_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython
    import IPython.display

    shown: list[str] = []
    place = SimpleNamespace(update=lambda html: shown.append(html.data))

    def display(html: IPython.display.HTML, display_id: bool) -> SimpleNamespace:
        shown.append(html.data)
        return place

    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", display)
    report = mm.progress("patching <b>")
    report(1, 4)
    report(4, 4)
    assert len(shown) == 2
    assert 'value="0.2500"' in shown[0]
    assert "patching &lt;b&gt; 25%" in shown[0]
    assert 'value="1.0000"' in shown[1]
