import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="the demo needs diffusers")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

from comfy_kitchen.tensor import QuantizedTensor

from lowbit.quant import demo, formats
from lowbit.quant.checkpoint import CheckpointError
from lowbit.quant.demo import plot, sampling
from lowbit.quant.demo.models import MODELS, WIDTH
from lowbit.quant.demo.row import cells

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Rounding the input adds at most as much as rounding the weight, and blocks and steps pile errors
# up; these models do so by less than 2. A wrong scale or order of nibbles gives errors near 1.
OUTPUT_OVER_WEIGHT = 4
# Stored per weight beside `Format.bits`: a float32 scale per row, and a marker of up to 256 bytes.
EXTRA_BITS = 32 / WIDTH + 8 * 256 / WIDTH**2


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def rows(out, progress):
    return demo.run(out, lambda done, total: progress.append((done, total)))


@pytest.fixture(scope="module")
def quantized(rows):
    return [row for row in rows if row.format != demo.SOURCE]


def test_every_model_is_there_in_every_format(rows):
    want = [(m.title, f) for m in MODELS for f in (demo.SOURCE, *formats.names())]
    assert [(row.model, row.format) for row in rows] == want


def test_progress_counts_the_rows(rows, progress):
    assert progress == [(done, len(rows)) for done in range(1, len(rows) + 1)]


def test_output_errors_follow_from_the_format(quantized):
    for row in quantized:
        bound = OUTPUT_OVER_WEIGHT * formats.get(row.format).max_error
        assert 0 < row.output_error < bound, row


def test_weight_errors_are_below_the_formats(quantized):
    for row in quantized:
        assert 0 < row.weight_error < formats.get(row.format).max_error, row


def test_bits_are_those_of_the_format(quantized):
    for row in quantized:
        bits = formats.get(row.format).bits
        # With a 4-bit format Qwen-Image's recipe leaves some layers in 8 bits.
        mixed = bits < 8 and row.model == "Qwen-Image"
        assert bits <= row.bits <= (8 if mixed else bits + EXTRA_BITS), row


def test_times_are_measured(rows, quantized):
    assert all(row.seconds_per_step > 0 for row in rows)
    assert all(row.quantize_seconds > 0 for row in quantized)


def test_files_are_smaller_than_the_source_and_load(rows):
    source_bytes = math.inf
    for row in rows:
        with safe_open(row.path, "pt") as file:
            assert len(list(file.keys())) > row.layers
        if row.format == demo.SOURCE:
            source_bytes = row.size_bytes
        else:
            assert row.size_bytes < source_bytes, row


def test_wan_bears_the_names_of_the_host(quantized):
    for row in quantized:
        if row.model == "Wan":
            names = load_file(row.path).keys()
            assert {"blocks.0.self_attn.q.weight", "head.modulation"} <= names
            assert not any("attn1" in name for name in names)


def test_page_holds_every_row_and_needs_nothing_else(out, rows):
    html = (out / demo.PAGE).read_text(encoding="utf-8")
    for line in cells(rows):
        for cell in line:
            assert f">{cell}<" in html
    # base64 has no colon
    assert "://" not in html
    assert re.findall(r'(?:src|href)="(.{10})', html) == ["data:image"]


def test_plot_is_an_image_with_something_on_it(out, rows):
    from matplotlib.image import imread

    pixels = imread(out / demo.PLOT)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert pixels.min() < 0.2 and pixels.max() == 1


def test_loaded_weights_stay_quantized(rows):
    row = next(row for row in rows if (row.model, row.format) == ("Wan", "nvfp4"))
    model = MODELS[0].build()
    assert sampling.load(model, row.path) == row.layers
    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    assert len(weights) == row.layers


@pytest.fixture
def source(rows):
    return load_file(rows[0].path)


def test_missing_tensor_is_named(source, tmp_path):
    del source["proj_out.bias"]
    save_file(source, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"the file lacks \['proj_out.bias'\]"):
        sampling.load(MODELS[0].build(), str(tmp_path / "a.safetensors"))


def test_tensor_left_over_is_named(source, tmp_path):
    save_file({**source, "stray": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"the model \['stray'\]"):
        sampling.load(MODELS[0].build(), str(tmp_path / "a.safetensors"))


def test_euler_steps_are_exact_for_a_constant_velocity():
    noise, velocity = torch.randn(2, 3), torch.randn(2, 3)
    sampled = sampling.sample(lambda latent, sigma: velocity, noise, steps=4)
    torch.testing.assert_close(sampled.latent, noise - velocity)


def test_labels_apart_are_not_moved():
    assert plot.spread([0.0, 1.0, 3.0], step=1.0) == [0.0, 1.0, 3.0]


def test_labels_that_touch_are_spread_around_their_mean():
    places = plot.spread([0.0, 0.1, 0.2, 0.9, 5.0], step=1.0)
    assert all(after - before >= 1 - 1e-9 for before, after in pairwise(places))
    assert sum(places[:4]) == pytest.approx(1.2) and places[4] == 5


def test_threads_are_as_before(rows):
    before = torch.get_num_threads()
    with demo._one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_wanted_packages_are_those_of_the_extra():
    extra = ", ".join(f'"{wanted}"' for wanted in demo.PACKAGES.values())
    assert f"\ndemo = [{extra}]\n" in PYPROJECT.read_text(encoding="utf-8")
