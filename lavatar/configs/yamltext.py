"""YAML that people write: values only, of no depth, size or cross references that could fill the memory."""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARACTERS = 2**20
DEEPEST = 20


Loader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
"""Makes no objects of Python's. libyaml's is ten times as fast."""


def _look_through(text: str) -> None:
    """Takes no aliases: nine lines of them unfold to gigabytes. Raises YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which is not taken")
        if isinstance(event, yaml.NodeEvent) and depth == DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {DEEPEST}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)


def read_yaml(text: str) -> Any:
    """The value that `text` says. Raises ValueError with the reason in one line."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS} characters")
    try:
        _look_through(text)
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
