import torch

from tests.cli import files


def test_a_file_equals_itself(lowbit, wan, tensors):
    code, out, _ = lowbit("compare", wan, wan)
    assert code == 0 and f"{len(tensors)} tensors equal" in out and "worst" not in out


def test_worst_layer_comes_first(lowbit, lowbit_json, wan, tensors, tmp_path):
    changed = files.marked(tensors, "int8")
    changed["blocks.0.norm3.weight"] = tensors["blocks.0.norm3.weight"] * 2
    path = files.saved(tmp_path / "m.safetensors", changed)
    code, result = lowbit_json("compare", wan, path)
    assert code == 0
    errors = [d["error"] for d in result["differences"]]
    assert errors == sorted(errors, reverse=True)
    assert result["differences"][0]["name"] == "blocks.0.norm3.weight" and errors[0] == 1
    _, out, _ = lowbit("compare", wan, path, "--top", "2")
    assert "100.000%  blocks.0.norm3.weight" in out and "and 9 more" in out


def test_prefix_and_diffusers_names_are_aligned(lowbit_json, tensors, tmp_path):
    named = files.saved(tmp_path / "a.safetensors", files.diffusers_named(tensors))
    prefixed = {f"model.diffusion_model.{n}": t for n, t in tensors.items()}
    code, result = lowbit_json("compare", named, files.saved(tmp_path / "b.safetensors", prefixed))
    assert code == 0
    assert {d["error"] for d in result["differences"]} == {0}
    assert not result["only_a"] and not result["only_b"]


def test_names_missing_on_either_side_are_listed(lowbit, wan, tensors, tmp_path):
    changed = {n: t for n, t in tensors.items() if n != "blocks.0.ffn.0.bias"}
    changed["extra.weight"] = torch.zeros(3)
    path = files.saved(tmp_path / "m.safetensors", changed)
    code, out, _ = lowbit("compare", wan, path)
    assert code == 0
    assert "only in A: 1 tensor\n  blocks.0.ffn.0.bias" in out
    assert "only in B: 1 tensor\n  extra.weight" in out


def test_unreadable_file_is_exit_code_2(lowbit, wan, tmp_path):
    code, out, err = lowbit("compare", wan, tmp_path / "none.safetensors")
    assert code == 2 and not out and "none.safetensors: No such file" in err
