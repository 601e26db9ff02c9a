"""Docstrings' notation, which is that of Sphinx and of transformers, as the Markdown that mkdocstrings reads."""

import re
import textwrap
from typing import Any

from griffe import Extension, Object

BLOCK = re.compile(r"^([ \t]*)\.\. math::[ \t]*((?:\S.*)?(?:\n|$)(?:[ \t]*\n|\1[ \t]+\S.*(?:\n|$))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]*)`")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?(?:[\w.]+\.)?(\w+)`")
REFERENCE = re.compile(r"\[`(~?)([\w.]+)(?:\(\))?`\]")


def to_markdown(text: str) -> str:
    """Formulas between dollars; roles as code; ``[`~package.Name`]`` as a link to where Name is described."""
    text = BLOCK.sub(_display, text)
    text = INLINE.sub(lambda found: f"${found[1]}$", text)
    text = ROLE.sub(r"`\1`", text)
    return REFERENCE.sub(_linked, text)


def _display(found: re.Match[str]) -> str:
    body = textwrap.indent(textwrap.dedent(found[2]).strip(), found[1])
    return f"\n{found[1]}$$\n{body}\n{found[1]}$$\n\n"


def _linked(found: re.Match[str]) -> str:
    shown = found[2].rpartition(".")[2] if found[1] else found[2]
    return f'<autoref identifier="{found[2]}" optional><code>{shown}</code></autoref>'


class Notation(Extension):
    """Rewrites every docstring once, before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites that of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
