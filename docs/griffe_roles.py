"""mkdocstrings: what docstrings say in Sphinx's words, said in Markdown."""

import re

import griffe

ROLE = re.compile(r":[a-z]+:`~?([^`<]*?)`")


class Roles(griffe.Extension):
    """``:class:`~a.b.Name``` is code, with the last name alone where a tilde asks for it; ``::`` begins a block of code."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        text = ROLE.sub(
            lambda found: f"`{found[1].rpartition('.')[2] if '~' in found[0] else found[1]}`", obj.docstring.value
        )
        obj.docstring.value = re.sub(r"::\n\n(?= )", ":\n\n", text)
