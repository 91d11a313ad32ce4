import dataclasses

import torch

from lowbit.ops import cache_folder
from lowbit.quant import doctor, formats


def test_text_names_every_format_and_what_is_missing(lowbit):
    code, out, err = lowbit("doctor")
    assert code == 0 and not err
    assert all(name in out for name in formats.names())
    assert torch.__version__ in out and "sageattention" in out and "comfy-kitchen" in out
    assert str(cache_folder.folder()) in out


def test_arithmetic_is_told_once_for_formats_that_it_does_the_same(monkeypatch, lowbit):
    found = doctor.diagnose()
    told = [("mxfp4", {"w4a16": "runs", "native": "refused: A"}), ("nvfp4", {"w4a16": "runs"})]
    supports = tuple(doctor.FormatSupport(n, "-", "-", False, {}, texts) for n, texts in told)
    found = dataclasses.replace(found, formats=supports)
    monkeypatch.setattr(doctor, "diagnose", lambda: found)
    lines = [line.split() for line in lowbit("doctor")[1].splitlines()]
    assert ["w4a16", "mxfp4,", "nvfp4", "runs"] in lines
    assert ["native", "mxfp4", "refused:", "A"] in lines
    assert lines[-1] == ["none"]


def test_json_is_one_object(lowbit_json):
    code, found = lowbit_json("doctor")
    assert code == 0
    assert [f["format"] for f in found["formats"]] == list(formats.names())
