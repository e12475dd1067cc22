"""All or nothing: a model that could not be converted is what it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give a model its classes, configurations, modules, hooks and mode back if the block raises.

    Values of weights are not kept: the block may add parameters and replace them, but not write into old ones.

    >>> layer = nn.Linear(2, 3)
    >>> try:
    ...     with unchanged_on_error(layer):
    ...         layer.extra = nn.Linear(2, 2)
    ...         raise ValueError
    ... except ValueError:
    ...     print(layer)
    Linear(in_features=2, out_features=3, bias=True)
    """
    objects: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in list(objects.values()):
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                objects |= {id(config): config for config in (value, *_inner_configs(value))}
    before = [(found, type(found), dict(vars(found)), _containers(found)) for found in objects.values()]
    try:
        yield
    except BaseException:
        for found, kind, attributes, containers in before:
            found.__class__ = kind
            vars(found).clear()
            vars(found).update(attributes)
            for container, contents in containers:  # in place, since handles of hooks know the very dictionary
                container.clear()
                container.extend(contents) if isinstance(container, list) else container.update(contents)
        raise


def _inner_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def _containers(found: Any) -> list[tuple[Any, Any]]:
    """The dictionaries, sets and lists among an object's attributes, each with a copy of what is in it."""
    return [(value, copy.copy(value)) for value in vars(found).values() if isinstance(value, (dict, set, list))]
