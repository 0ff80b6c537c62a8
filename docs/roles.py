"""Turn references to Python objects in docstrings into links of the site.

Docstrings name objects as Sphinx does (a role, then the name in backquotes), which IDEs show well;
the site is Markdown, where such a reference is a link to the object's anchor. The two colons before
an indented block, which Sphinx asks for, become one.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

LITERAL = re.compile(r"::(?=\n\n[ \t])")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrite the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite its docstring, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value, obj)


def rewritten(text: str, obj: griffe.Object) -> str:
    """Return a docstring whose roles are links, or just code where the site has no such object."""

    def link(match: re.Match[str]) -> str:
        short, name = match[1] == "~", match[2]
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            path = name
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    return ROLE.sub(link, LITERAL.sub(":", text))
