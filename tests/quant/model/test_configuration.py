"""Configurations in files: models of diffusers only, no larger than the file, named errors."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.quant.checkpoint import Checkpoint, CheckpointError
from lowbit.quant.model.configuration import (
    CONFIG_KEY,
    LARGEST_COUNT,
    _longest_list,
    build,
    too_large,
)
from tests.quant.model.conftest import BLOCKS, SMALL, only_wan


@pytest.fixture
def changed(model, tmp_path):
    """A function (configuration's changes, or its text) -> a file of the model with them."""
    lowbit.save_model(model, tmp_path / "model.safetensors")
    config = json.loads(Checkpoint(tmp_path / "model.safetensors").metadata[CONFIG_KEY])
    # What is listed there is not read.
    del config["_use_default_values"]

    def write(change, **empty):
        text = change if isinstance(change, str) else json.dumps({**config, **change})
        path = tmp_path / "changed.safetensors"
        save_file(load_file(tmp_path / "model.safetensors") | empty, path, {CONFIG_KEY: text})
        return path

    return write


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Building fails: what is refused has to be so before."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr("diffusers.ModelMixin.__init__", fail)


@pytest.mark.parametrize("name", ["AutoencoderKLWan2", "WanPipeline", "__loader__", "os.system"])
@only_wan
def test_configurations_name_models_of_diffusers_only(changed, name):
    path = changed({"_class_name": name})
    with pytest.raises(ValueError, match=rf"changed\.safetensors: .* has no model called {name}"):
        lowbit.load_model(path)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "3", "{}", "{", "[" * 100_000, '{"_class_name":' * 100_000],
    ids=lambda text: repr(text[:20]),
)
@only_wan
def test_text_that_is_no_configuration_names_the_file(changed, text):
    with pytest.raises(CheckpointError, match=r"changed\.safetensors: its configuration"):
        lowbit.load_model(changed(text))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\xff", b"{", b"[" * 100_000], ids=lambda text: repr(text[:20])
)
@only_wan
def test_file_that_is_no_configuration_is_named(model, tmp_path, content):
    lowbit.save_model(model, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is malformed"):
        lowbit.load_model(tmp_path / "model.safetensors", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": BLOCKS + 1},
        {"num_layers": 10**9},
        {"num_attention_heads": 10**6},
        {"attention_head_dim": 10**6},
        {"num_attention_heads": 10**12},
        {"in_channels": 10**12},
        {"patch_size": [1, 2, 10**12]},
    ],
    ids=str,
)
def test_model_larger_than_the_file_is_refused_before_it_is_built(
    changed, nothing_is_built, change
):
    (key,) = change
    with pytest.raises(CheckpointError, match=f"its configuration: .*{key} .* pass the model"):
        lowbit.load_model(changed(change))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_max_seq_len": 1 << 18},
        {"rope_max_seq_len": 10**12},
        {"pos_embed_seq_len": 1 << 17, "image_dim": 1 << 19},
    ],
    ids=str,
)
@only_wan
def test_table_of_positions_is_bounded(changed, nothing_is_built, change):
    with pytest.raises(CheckpointError, match="seq_len is"):
        lowbit.load_model(changed(change))


@only_wan
def test_longer_table_of_positions_than_wans_is_built(changed):
    path = changed({"rope_max_seq_len": 8192})
    assert build(Checkpoint(path)).rope.freqs_cos.shape[0] == 8192


@pytest.mark.parametrize("small", SMALL[1:], indirect=True, ids=["qwen_image"])
def test_axes_wider_than_the_file_are_refused(changed, nothing_is_built):
    for widest in (57, 1 << 19):
        with pytest.raises(CheckpointError, match=r"axes_dims_rope is .* room for 128 channels"):
            lowbit.load_model(changed({"axes_dims_rope": [16, 56, widest]}))


@pytest.mark.parametrize("key", ["rope_theta", "theta", "time_theta", "rope_base", "max_period"])
@only_wan
def test_numbers_of_frequencies_may_be_of_any_size(changed, key):
    checkpoint = Checkpoint(changed({}))
    assert too_large({key: 5_000_000}, checkpoint) is None
    assert too_large({f"{key}_rows": 5_000_000}, checkpoint)


@pytest.mark.skipif(
    not hasattr(diffusers, "Ideogram4Transformer2DModel"), reason="diffusers is too old for it"
)
def test_saved_model_of_large_frequencies_loads(tmp_path):
    small = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4}
    small |= {"intermediate_size": 256, "adaln_dim": 64, "llm_features_dim": 128}
    model = diffusers.Ideogram4Transformer2DModel(**small, mrope_section=(8, 4, 4))
    assert model.config.rope_theta > LARGEST_COUNT
    lowbit.quantize_model(model, "int8", recipe="none")
    lowbit.save_model(model, path := tmp_path / "model.safetensors")
    assert type(lowbit.load_model(path)) is type(model)


@only_wan
def test_folder_whose_configuration_is_refused_is_not_asked_for_again(changed, tmp_path):
    path = changed({})
    config = json.loads(Checkpoint(path).metadata[CONFIG_KEY]) | {"num_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"pass the model$"):
        build(Checkpoint(path), tmp_path)


@pytest.mark.parametrize(
    "empty",
    [
        {"wide": torch.empty(1 << 40, 0)},
        {f"blocks.{i}.more": torch.empty(0) for i in range(BLOCKS, 50)},
    ],
    ids=["wide", "long"],
)
@only_wan
def test_empty_tensors_make_no_file_larger(changed, nothing_is_built, empty):
    for change in ({"attention_head_dim": 1 << 30}, {"num_layers": 50}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            lowbit.load_model(changed(change, **empty))


@pytest.mark.parametrize("value", ["x", None, -5, 0.5, [], {}])
@pytest.mark.parametrize("key", ["num_layers", "attention_head_dim", "patch_size"])
@only_wan
def test_value_of_another_kind_names_the_file(changed, key, value):
    with pytest.raises(CheckpointError, match=r"changed\.safetensors"):
        lowbit.load_model(changed({key: value}))


@only_wan
def test_keys_that_the_class_does_not_take_are_no_matter(changed):
    path = changed({"_somebodys_own": 10**15, "also": [10**15]})
    assert isinstance(lowbit.load_model(path), torch.nn.Module)


def test_longest_list_is_found_within_others():
    names = [f"down.{i}.attentions.0.transformer.{j}.ff.bias" for i in range(3) for j in range(5)]
    assert _longest_list(names) == 5
    assert _longest_list(["weight", "a.b.weight"]) == 0
    assert _longest_list(["blocks.7.weight", "blocks.1000000000.weight"]) == 2
