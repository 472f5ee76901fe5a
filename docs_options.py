"""mkdocstrings: the docstring of an options class is made of its fields when the class is, so it is read from there."""

from importlib import import_module

import griffe


class OptionDocstrings(griffe.Extension):
    """Replaces the docstring of every class with `@document_options`."""

    def on_class(self, *, cls: griffe.Class, **_):
        """Called by griffe for each class that it has read."""
        if any("document_options" in str(decorator.value) for decorator in cls.decorators):
            text = getattr(import_module(cls.module.path), cls.name).__doc__
            cls.docstring = griffe.Docstring(text, parent=cls)
