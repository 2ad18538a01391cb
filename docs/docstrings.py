"""The Markdown of our docstrings, as the reStructuredText that autodoc reads.

They differ in what stands indented behind an empty line (a formula, word for word), and in `|x|`,
which would be a substitution.
"""

import re

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
CODE = re.compile(r"(`[^`]*`)")


def from_markdown(app, what, name, obj, options, lines: list[str]) -> None:
    """Rewrite the lines of one docstring in place."""
    lines[:] = _converted(lines)


def _converted(lines: list[str]) -> list[str]:
    done, formula, section = [], False, False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            formula, section = False, bool(SECTION.match(line))
        elif indented and not section and not formula and not done[-1:][0].strip():
            formula = True
            done += ["::", ""]
        done.append(line if formula else escaped(line))
    return done


def escaped(line: str) -> str:
    parts = CODE.split(line)
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return "".join(parts)
