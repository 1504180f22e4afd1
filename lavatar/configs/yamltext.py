"""YAML that people write: values only, of no depth, size or cross references that could fill the memory."""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARACTERS = 2**20
DEEPEST = 20


class _Loader(yaml.SafeLoader):
    """Makes no objects of Python's, and takes no aliases: nine lines of them unfold to gigabytes."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which is not taken")
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {DEEPEST}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_yaml(text: str) -> Any:
    """The value that `text` says. Raises ValueError with the reason in one line."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS} characters")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
