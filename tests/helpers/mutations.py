"""Seeded damage to configurations: what people mistype, and what nobody would write."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator

from sctd_ds import deepspeed_schema

ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1.0, 1e30, 10**12, 2**31, 2**63, 10**400, 1e-320),
    *(float("nan"), float("inf"), "", "auto", "3", "true", "a", "fp16", "cpu", "é" * 300, "a\nb", "\x00", "../..", "{name}"),
    *([], [0], [0.9, 0.999], [None], ["a", 1], [[0.1]], {}, {"enabled": True}, {"type": "Adam"}, {"a": {"b": [{}]}}),
]
"""Values of every type, few of which any key takes."""


def mutated(settings: dict, generator: random.Random, changes: int = 1) -> tuple[dict, str]:
    """A copy with some changes, and what they were."""
    config, told = copy.deepcopy(settings), []
    for _ in range(changes):
        change = generator.choice(CHANGES)
        told.append(f"{change.__name__}: {change(config, generator)}")
    return config, "; ".join(told)


def another_value(config: dict, generator: random.Random) -> str:
    block, key, path = _somewhere(config, generator)
    block[key] = copy.deepcopy(generator.choice(ODD))
    return f"{path}={block[key]!r}"


def another_number(config: dict, generator: random.Random) -> str:
    numbers = [at for at in _keys(config) if isinstance(at[0][at[1]], int | float)]
    if not numbers:
        return another_value(config, generator)
    block, key, path = generator.choice(numbers)
    block[key] = block[key] * generator.choice([-1, 0, 0.37, 2, 10, 1e6, 1e20])
    return f"{path}={block[key]!r}"


def misspelt_key(config: dict, generator: random.Random) -> str:
    block, key, path = _somewhere(config, generator)
    at = generator.randrange(len(key) + 1)
    typo = key[:at] + generator.choice("abcdefghijklmnopqrstuvwxyz_. ") + key[at + generator.randrange(2) :]
    block[typo] = block.pop(key)
    return f"{path} -> {typo!r}"


def missing_key(config: dict, generator: random.Random) -> str:
    block, key, path = _somewhere(config, generator)
    del block[key]
    return path


def swapped_values(config: dict, generator: random.Random) -> str:
    (one, key, path), (other, name, where) = _somewhere(config, generator), _somewhere(config, generator)
    if f"{where}.".startswith(f"{path}.") or f"{path}.".startswith(f"{where}."):
        return "nothing"
    one[key], other[name] = other[name], one[key]
    return f"{path} and {where}"


def another_block(config: dict, generator: random.Random) -> str:
    """One of DeepSpeed's keys, with any value."""
    name = generator.choice([*deepspeed_schema.BLOCKS, *deepspeed_schema.VALUES.model_fields])
    model, value = deepspeed_schema.BLOCKS.get(name), copy.deepcopy(generator.choice(ODD))
    if model is not None:
        key = generator.choice(sorted(model.model_fields))
        value = {key: value if isinstance(value, bool) else generator.choice([value, True, False, 1, "fp32"])}
    config[name] = {**config[name], **value} if isinstance(config.get(name), dict) and isinstance(value, dict) else value
    return f"{name}={value!r}"


def nested_deeply(config: dict, generator: random.Random) -> str:
    block, key, path = _somewhere(config, generator)
    depth = generator.choice([3, 30, 300])
    for _ in range(depth):
        block[key] = {key: block[key]} if generator.random() < 0.5 else [block[key]]
    return f"{path}, {depth} times"


CHANGES: list[Callable[[dict, random.Random], str]] = [
    *(another_value, another_value, another_number, another_number, misspelt_key, missing_key, swapped_values),
    *(another_block, another_block, another_block, nested_deeply),
]


def _somewhere(config: dict, generator: random.Random) -> tuple[dict, str, str]:
    """A block of the configuration, one of its keys, and that key with dots."""
    return generator.choice(list(_keys(config)))


def _keys(block: dict, path: str = "") -> Iterator[tuple[dict, str, str]]:
    for key, value in block.items():
        yield block, key, path + key
        if isinstance(value, dict):
            yield from _keys(value, f"{path}{key}.")


def as_text(config: dict) -> str:
    """The file, in which NaN and Infinity stand as Python writes them."""
    return json.dumps(config)
