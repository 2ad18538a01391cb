"""Tiny tensors gain nothing from a second thread and lose much where another program runs."""

import re

import torch

torch.set_num_threads(1)

TESTED = re.compile(r"test_conformance\.py::test_family\[(.*-(?:image|video|audio))-(.*)\]")


def pytest_terminal_summary(terminalreporter):
    """The table of families and points, where the conformance suite ran."""
    marks = {"passed": "+", "skipped": "-", "failed": "FAIL", "error": "FAIL"}
    found = [
        (match[1], match[2], mark)
        for outcome, mark in marks.items()
        for report in terminalreporter.stats.get(outcome, [])
        if (match := TESTED.search(getattr(report, "nodeid", "")))
    ]
    points = list(dict.fromkeys(point for _, point, _ in found))
    if len(points) < 2:
        return
    cells = {(family, point): mark for family, point, mark in found}
    terminalreporter.section("conformance (+ passes, - cannot: docs/families.md says why)")
    terminalreporter.line(" " * 30 + "  ".join(points))
    for family in dict.fromkeys(family for family, _, _ in found):
        row = "  ".join(cells.get((family, point), "").center(len(point)) for point in points)
        terminalreporter.line(f"{family:30}{row}")
