import pytest
import torch

from tests.cli import files


def test_good_file_is_described_with_exit_code_0(lowbit, tensors, tmp_path):
    path = files.saved(tmp_path / "m.safetensors", files.marked(tensors, "fp8_e4m3"))
    code, out, err = lowbit("inspect", path)
    assert code == 0 and not err
    assert "Wan 2.1 / 2.2, t2v, 1 block" in out
    assert "fp8_e4m3  10 layers" in out and "bfloat16  6 layers" in out
    assert "8.00 in quantized layers" in out
    # A weight of NaN is not seen, so that not too much is promised.
    assert out.endswith("nothing that would load wrongly; weights were not read\n")


def test_json_holds_what_the_text_says(lowbit_json, tensors, tmp_path):
    prefixed = {f"model.diffusion_model.{n}": t for n, t in tensors.items()}
    prefixed["first_stage_model.conv.weight"] = torch.zeros(4, 4, 3, 3)
    code, report = lowbit_json("inspect", files.saved(tmp_path / "m.safetensors", prefixed))
    assert code == 0
    assert report["prefix"] == "model.diffusion_model." and report["outside"] == 1
    assert report["family"] == "wan" and report["variant"] == "t2v"
    assert report["bits_quantized"] is None and report["formats"]["bfloat16"]["count"] == 16


def test_ignored_scales_are_an_error_in_comfyui(lowbit, tensors, tmp_path):
    path = files.saved(tmp_path / "m.safetensors", files.legacy_fp8(tensors, flag=False))
    code, out, _ = lowbit("inspect", path)
    assert code == 1
    assert "error in ComfyUI: scale_ignored, 10 layers" in out
    assert "would load wrongly, or not at all, in ComfyUI" in out


def test_legacy_file_with_its_flag_is_good(lowbit, tensors, tmp_path):
    for name, dtype in (("host", torch.float32), ("wrapper", torch.bfloat16)):
        path = files.saved(tmp_path / f"{name}.safetensors", files.legacy_fp8(tensors, dtype))
        assert lowbit("inspect", path)[0] == 0


def test_diffusers_named_wan_is_refused_by_comfyui_only(lowbit_json, tensors, tmp_path):
    path = files.saved(tmp_path / "m.safetensors", files.diffusers_named(tensors))
    code, report = lowbit_json("inspect", path)
    assert code == 1
    assert [(p["code"], p["affects"]) for p in report["problems"]] == [
        ("diffusers_names", ["ComfyUI"])
    ]


def test_folder_of_shards_is_inspected_as_one(lowbit_json, tensors, tmp_path):
    code, report = lowbit_json("inspect", files.sharded(tmp_path / "shards", tensors))
    assert code == 0 and report["tensors"] == len(tensors)


@pytest.mark.parametrize("cut", [3, 500, -1])
def test_truncated_file_is_exit_code_2(lowbit, wan, tmp_path, cut):
    path = tmp_path / "m.safetensors"
    path.write_bytes(wan.read_bytes()[:cut])
    code, out, err = lowbit("inspect", path)
    assert code == 2 and not out
    assert err.startswith(f"lowbit: {path}: ") and err.count("\n") == 1


def test_corrupt_header_is_exit_code_2(lowbit, wan, tmp_path):
    data = bytearray(wan.read_bytes())
    data[10] = 0xFF
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert lowbit("inspect", path)[0] == 2
