"""The record that goes into a file's metadata."""

import json
import re
from pathlib import Path

import pytest

from lowbit.quant import record
from lowbit.quant.record import LayerRecord


def test_version_is_the_packages():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', project, re.M)[1] == record.VERSION


def test_record_says_what_became_of_each_layer():
    records = [
        LayerRecord("a", "nvfp4", (20, 40), 100, 0.0951234),
        LayerRecord("b", "int8", (16, 16), 300, None, "as stored"),
        LayerRecord("c", None, (16, 16), 512, None, "norms are never quantized"),
    ]
    text = record.encode(records, recipe="wan")
    layers = record.decode({record.RECORD_KEY: text})
    assert layers["a"] == {"format": "nvfp4", "error": 0.09512, "shape": [20, 40]}
    assert layers["b"] == {"format": "int8", "reason": "as stored"}
    whole = json.loads(text)
    assert whole["recipe"] == "wan"
    assert whole["kept"] == {"c": "norms are never quantized"}
    assert set(whole["versions"]) == {"lowbit", "torch", "comfy-kitchen"}


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", '{"layers": 3}', '{"layers": {"a": 1}}', "null", "[" * 100_000],
    ids=lambda text: repr(text[:20]),
)
def test_damaged_record_is_no_record(text):
    assert record.decode({record.RECORD_KEY: text}) == {}


@pytest.mark.parametrize("error", ["0.1", [0.1], None, True, float("nan"), 10**400])
def test_error_that_is_no_number_is_left_out(error):
    text = json.dumps({"layers": {"a": {"format": "int8", "error": error}}})
    assert record.decode({record.RECORD_KEY: text}) == {"a": {"format": "int8"}}
