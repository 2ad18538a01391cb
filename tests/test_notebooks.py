"""Every notebook runs from top to bottom, and what it claims holds: it asserts its own claims."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

OTHER_MODEL = """\
# What is asserted holds for the demo model; another one is this line with, for example,
# "llava-hf/llava-1.5-7b-hf", device="cuda", dtype="bfloat16".
model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
"""
FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert any("assert " in source for source in code)
    assert any(OTHER_MODEL in f"{source}\n" for source in code)
    assert not any(source.startswith(("def ", "class ")) for source in code)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
