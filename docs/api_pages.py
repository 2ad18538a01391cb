"""The pages of the API: one for each module that a name of `mechmm.__all__` comes from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docstrings import escaped
from docutils import nodes
from sphinx.addnodes import pending_xref

import mechmm
from mechmm.results import result

ROOMS = {
    "model": "Models, inputs and positions",
    "data": "Pairs and metrics",
    "engine": "Sites, sweeps and graphs",
    "methods": "Methods and their results",
    "results": "Circuits, graphs and pages",
    "runs": "Reproducible runs",
}
"""What the names of every room are."""
STOP = "HookedRootModule, Module, ABC, KeyError, ValueError"
"""Members that these bases bring are told elsewhere."""
CALLED = re.compile(r"(?:mm|mechmm)\.([A-Za-z_][\w.]*)")
"""How pages name what is public."""
CLASS = re.compile(f"({'|'.join(name for name in mechmm.__all__ if name[0].isupper())})")
"""Classes are named without `mm.`, too."""


def api_pages() -> Iterator[tuple[str, str]]:
    """Names and texts of all pages, in reStructuredText."""
    homes = _homes()
    for room, title in ROOMS.items():
        own = {home: names for home, names in homes.items() if home.split(".")[1] == room}
        yield room, _room_page(title, own)
        for home, names in own.items():
            yield home.removeprefix("mechmm.").replace(".", "/"), _module_page(home, names)


def _homes() -> dict[str, dict[str, object]]:
    """The public names as users write them, with what they stand for, by module."""
    homes: dict[str, dict[str, object]] = {}
    public = {f"mechmm.{name}": getattr(mechmm, name) for name in mechmm.__all__}
    for name, thing in sorted(public.items(), key=lambda named: isinstance(named[1], ModuleType)):
        _add(homes, thing, name)
    _add(homes, result, result.__name__)
    return {home: _functions_first(homes[home]) for home in sorted(homes)}


def _add(homes: dict[str, dict[str, object]], thing: Any, called: str) -> None:
    """A function or class by its first name, or all that is public in a module."""
    if isinstance(thing, ModuleType):
        for name in getattr(thing, "__all__", vars(thing)):
            if _belongs(inner := getattr(thing, name), name, thing):
                _add(homes, inner, f"{called}.{name}")
    elif callable(thing) and thing.__doc__ and thing.__module__.startswith("mechmm."):
        names = homes.setdefault(thing.__module__, {})
        if thing not in names.values():
            names[called] = thing


def _belongs(thing: Any, name: str, module: ModuleType) -> bool:
    """Whether a name of a module is public: those of `__all__`, or without it the module's own."""
    own = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
    return own or hasattr(module, "__all__")


def _functions_first(names: dict[str, object]) -> dict[str, object]:
    return dict(sorted(names.items(), key=lambda named: inspect.isclass(named[1])))


def _room_page(title: str, homes: dict[str, dict[str, object]]) -> str:
    lines = [title, "=" * len(title), "", ".. list-table::", "   :widths: 2 3", ""]
    for names in homes.values():
        for name, thing in names.items():
            first = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
            lines += [f"   * - :py:obj:`{name}`", f"     - {escaped(first)}"]
    lines += ["", ".. toctree::", "   :hidden:", ""]
    lines += [f"   {home.removeprefix('mechmm.').replace('.', '/')}" for home in homes]
    return "\n".join([*lines, ""])


def _module_page(home: str, names: dict[str, object]) -> str:
    title = home.rpartition(".")[2]
    file = f"``{home.replace('.', '/')}.py``"
    lines = [title, "=" * len(title), "", file, "", f".. automodule:: {home}", ""]
    for name, thing in names.items():
        if inspect.isclass(thing):
            options = ["   :members:", "   :show-inheritance:"]
            if name == "mechmm.HookedMultimodal":
                options.append(f"   :inherited-members: {STOP}")
            lines += [f".. autoclass:: {name}", *options, ""]
        else:
            lines += [f".. autofunction:: {name}", ""]
    return "\n".join(lines)


def link_names(app, doctree: nodes.document) -> None:
    """Make `mm.patch(...)` in the text of a page a link to the API."""
    for code in list(doctree.findall(nodes.literal)):
        found = CALLED.match(code.astext()) or CLASS.fullmatch(code.astext())
        if found and not isinstance(code.parent, (nodes.reference, pending_xref, nodes.title)):
            link = pending_xref(
                "",
                code.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=f"mechmm.{found[1].rstrip('.')}",
                refdoc=app.env.docname,
                refwarn=False,
            )
            code.replace_self(link)
