# SPDX-License-Identifier: Apache-2.0
"""A Griffe extension: docstrings as this project writes them, for the API reference.

The docstrings have Sphinx's roles, reStructuredText's `::` and a section `Example`, which read well
in a terminal. MkDocs wants Markdown.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc):`(~?)([^`]+)`")
# A section that Griffe knows by its plural only.
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# A section without names of errors, such as "Raises: As other_function."
RAISES_AS = re.compile(r"^Raises:\n +As (.*)$", re.MULTILINE)
# "clamp: > 0 limits ..." would become a quotation.
COMPARISON = re.compile(r"^( +\w+: )>", re.MULTILINE)
LITERAL_BLOCK = re.compile(r"^( *)(.*?)::\n\n", re.MULTILINE)


class ProjectDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: griffe.Object) -> str:
    """The docstring of `obj` in Markdown."""

    def reference(match: re.Match[str]) -> str:
        name = match[2]
        shown = name.rpartition(".")[2] if match[1] else name
        target = f"<autoref optional identifier={path_of(name, obj)!r}>"
        return f"{target}<code>{shown}</code></autoref>"

    text = EXAMPLE.sub("Examples:", text)
    text = RAISES_AS.sub(r"Raises the same errors as \1", text)
    text = COMPARISON.sub(r"\1\>", text)
    text = LITERAL_BLOCK.sub(lambda m: f"{m[1]}{m[2]}:\n\n" if m[2] else "", text)
    return ROLE.sub(reference, text)


def path_of(name: str, obj: griffe.Object) -> str:
    """The full path of what a role in the docstring of `obj` calls `name`."""
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name
