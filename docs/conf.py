"""How Sphinx builds the site. `docs/build_site.py` lays out the pages; `make docs` calls it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from api_pages import link_names
from docstrings import from_markdown

import mechmm

project, copyright = "mechmm", "the mechmm authors"
version = release = mechmm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
default_role = "py:obj"  # `name` in a docstring: a link where there is one, else code
highlight_language = "none"  # a block without a language is a formula, a table or a command

# Headings get the anchors that they have on GitHub. A missing anchor or page is a warning, and a
# warning an error.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a table of a README may begin below level 2

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = "mechmm"
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"


def setup(app):
    app.connect("autodoc-process-docstring", from_markdown, priority=100)  # before napoleon
    app.connect("doctree-read", link_names)
