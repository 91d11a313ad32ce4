import torch

from lowbit.ops import cache_folder
from lowbit.quant import formats


def test_text_names_every_format_and_what_is_missing(lowbit):
    code, out, err = lowbit("doctor")
    assert code == 0 and not err
    assert all(name in out for name in formats.names())
    assert torch.__version__ in out and "sageattention" in out and "comfy-kitchen" in out
    assert str(cache_folder.folder()) in out


def test_json_is_one_object(lowbit_json):
    code, found = lowbit_json("doctor")
    assert code == 0
    assert [f["format"] for f in found["formats"]] == list(formats.names())
