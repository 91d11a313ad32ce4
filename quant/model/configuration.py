"""Diffusers models made from a configuration that a file holds, empty and no larger than the file.

A configuration is somebody's text. What of a model takes memory or time before a weight is read,
its layers and its tables of positions, is held against the tensors of the file first.
"""

import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoint import Checkpoint, CheckpointError
from ..checkpoint.header import parse_json

# Where our files keep a diffusers model's configuration; the host reads "config" itself.
CONFIG_KEY = "_lowbit_diffusers_config"
CONFIG_FILE = "config.json"
CLASS_NAME = "_class_name"
# An integer that counts layers, such as num_layers, num_single_layers or depth.
LAYERS = re.compile(r"(^|_)(layers|depth)(_|$)|^num_.*blocks$")
# A layer's place in its list, as tensors are named in diffusers and in the host.
PLACE = re.compile(r"\.(\d+)(?=\.)")
# One that counts positions: a table has a row for each, of a head's channels or an image's.
POSITIONS = re.compile(r"(^|_)seq_len$")
# One that names the channels of a head that each axis of the positions has.
AXES = re.compile(r"(^|_)axes_dims?(_|$)")
# A number that frequencies are made of, of any size: it asks for no memory.
FREQUENCIES = re.compile(r"(^|_)theta$|(^|_)rope_base$|(^|_)max_period$")
# What classes raise for values that they were not written for, such as text for a number.
CANNOT_BUILD = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
)
HEADS, HEAD_SIZE, IMAGE_SIZE = "num_attention_heads", "attention_head_dim", "image_dim"
# Wan's table has 2**17 elements, of float64; the longest allowed takes a quarter of a gigabyte.
TABLE_ELEMENTS = 1 << 24
# Steps, positions, frequencies: what no tensor of the file shows.
LARGEST_COUNT = 1 << 20
# Two columns of a 4-bit weight share a byte, and a file shows half its width.
PACKED = 2


def build(checkpoint: Checkpoint, folder: str | os.PathLike | None = None) -> nn.Module:
    """Return the diffusers model of a configuration, most of its weights on the meta device.

    folder: with diffusers' config.json; None: what `save_model` wrote into the file, or the
    config.json beside shards. Raises CheckpointError for what is no configuration, and for one of a
    model larger than the file; ValueError where there is none, or its model is not diffusers'.
    """
    import diffusers

    config, where = _read(checkpoint, folder)
    name = str(config[CLASS_NAME])
    kind = None if name.startswith("_") else getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise ValueError(f"{where}: diffusers {diffusers.__version__} has no model called {name}")
    taken = inspect.signature(kind.__init__).parameters
    problem = too_large({k: v for k, v in config.items() if k in taken}, checkpoint)
    if problem:
        other = "" if folder else ", or a folder with the config.json of this file"
        raise CheckpointError(f"{where}: {problem}; pass the model{other}")
    try:
        with _EmptyOnMeta():
            return kind.from_config(config).requires_grad_(False)
    except CANNOT_BUILD as error:
        raise CheckpointError(f"{where}: diffusers makes no {name} of it: {error}") from error


def _read(checkpoint: Checkpoint, folder: str | os.PathLike | None) -> tuple[dict[str, Any], str]:
    """Return (configuration, where it stands)."""
    if folder is None and CONFIG_KEY in checkpoint.metadata:
        text, where = checkpoint.metadata[CONFIG_KEY], f"{checkpoint.path}: its configuration"
    else:
        where = os.path.join(checkpoint.path if folder is None else os.fspath(folder), CONFIG_FILE)
        if not os.path.isfile(where):
            raise ValueError(
                f"{checkpoint.path}: it has no configuration of a diffusers model; pass the model, "
                "or a folder with its config.json"
            )
        with open(where, "rb") as file:
            text = file.read()
    config = parse_json(text, where)
    if not isinstance(config, dict) or CLASS_NAME not in config:
        raise CheckpointError(f"{where} has no {CLASS_NAME}")
    return config, where


def too_large(config: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    """Return what in `config` asks for more than the tensors of `checkpoint` fill, or None.

    config: what the model's class takes, of any class. Layers are at most as many as the longest
    list in the file has, heads together at most as wide as the largest size of a tensor, tables of
    positions at most `TABLE_ELEMENTS`, and any other integer but those of frequencies at most
    `LARGEST_COUNT` or that size.
    Empty tensors, which may have any shape, show nothing. Not told: a table of all places of a
    picture, which classes other than Wan's and Qwen-Image's may make.
    """
    filled = {name: info.shape for name, info in checkpoint.items() if math.prod(info.shape)}
    width = PACKED * max((size for shape in filled.values() for size in shape), default=0)
    layers = _longest_list(filled)
    for key, value in config.items():
        largest = max(_integers(value), default=0)
        if LAYERS.search(key) and largest > layers:
            return f"{key} is {largest}, the file has {layers} layers"
        if largest > max(width, LARGEST_COUNT) and not FREQUENCIES.search(key):
            return f"{key} is {largest}, larger than any tensor of the file"
    head, heads = (max(_integers(config.get(key)), default=1) for key in (HEAD_SIZE, HEADS))
    if head * heads > width:
        return f"{HEADS} {heads} of {HEAD_SIZE} {head} are wider than any tensor of the file"
    row = max(head, *_integers(config.get(IMAGE_SIZE)), 1)
    channels = head if HEAD_SIZE in config else width
    for key, value in config.items():
        numbers = list(_integers(value))
        if POSITIONS.search(key) and max(numbers, default=0) * row > TABLE_ELEMENTS:
            return f"{key} is {max(numbers)}, at most {TABLE_ELEMENTS // row} are allowed"
        if AXES.search(key) and sum(numbers) > channels:
            return f"{key} is {value}, there is room for {channels} channels"
    return None


def _integers(value: Any) -> Iterator[int]:
    """Yield the integers in a value of a configuration."""
    if type(value) is int:
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _integers(part)


def _longest_list(names) -> int:
    """Return how many layers the longest list of layers has, by the names of its tensors."""
    found: dict[str, set[str]] = {}
    for name in names:
        for place in PLACE.finditer(name):
            found.setdefault(name[: place.start()], set()).add(place[1])
    return max(map(len, found.values()), default=0)


class _EmptyOnMeta(TorchFunctionMode):
    """Within it `torch.empty`, of which modules make their weights, takes no memory.

    What else they compute, such as tables of rotary embeddings, is there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
