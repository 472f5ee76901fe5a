"""mkdocstrings: docstrings are written as in TRL, and those of options classes are made of their fields."""

import re
from importlib import import_module

import griffe

TYPE = re.compile(r"^(\s*[\w*, `()]+? )\((.+?)\):", re.M)
LINK = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)(\(\))?`\]")


class HouseDocstrings(griffe.Extension):
    """Turns TRL's marks into what the page shows."""

    def on_class(self, *, cls: griffe.Class, **_):
        """Reads the docstring of a class with `@document_options` from the class itself."""
        if any(re.search("document_(own_)?options", str(decorator.value)) for decorator in cls.decorators):
            text = getattr(import_module(cls.module.path), cls.name).__doc__
            cls.docstring = griffe.Docstring(text, parent=cls)

    def on_object(self, *, obj: griffe.Object, **_):
        """Takes the marks from types, which are shown as code with their default, and the brackets from names."""
        if obj.docstring is not None:
            text = TYPE.sub(lambda found: f"{found[1]}({_clean(found[2])}):", obj.docstring.value)
            text = re.sub(r"^( +)`(\w+)`:", r"\1\2:", text, flags=re.M)  # of raised errors
            obj.docstring.value = LINK.sub(r"`\1\2`", text)


def _clean(kind: str) -> str:
    return re.sub(r",? ?\*optional\*(, defaults to .*)?", "", kind).replace("`", "")
