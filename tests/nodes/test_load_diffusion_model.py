"""What the loader node asks for when its user chooses no format."""

import pytest
import torch
from safetensors.torch import save_file

from lowbit.nodes import load_diffusion_model
from lowbit.nodes.load_diffusion_model import LowBitLoadDiffusionModel
from lowbit.quant.best import BEST


@pytest.fixture
def load(tmp_path, monkeypatch, caplog):
    """Return a function that loads a file of `dtype`: (format asked of the host, lines logged)."""
    asked = []
    monkeypatch.setattr(load_diffusion_model.host, "model_path", lambda name: path)
    monkeypatch.setattr(load_diffusion_model.host, "load_model", lambda *args: asked.append(args))
    path = tmp_path / "model.safetensors"

    def once(dtype, format="auto", recipe="auto", keep=""):
        save_file({"blocks.0.m.weight": torch.zeros(256, 256, dtype=dtype)}, path)
        LowBitLoadDiffusionModel().load(path.name, format, recipe, keep)
        return asked.pop()[1], [record.getMessage() for record in caplog.records]

    return once


@pytest.mark.parametrize("ignored", [{"recipe": "none"}, {"keep": r"\.0\."}])
def test_file_kept_as_stored_tells_once_that_recipe_and_keep_are_not_used(load, ignored):
    chosen, (line,) = load(torch.float8_e4m3fn, **ignored)
    assert chosen == "as_stored"
    assert "model.safetensors" in line and "recipe and keep are not used" in line


@pytest.mark.parametrize("format", ["auto", "as_stored", BEST])
def test_nothing_is_said_where_nothing_is_ignored_or_nobody_left_the_choice(load, format):
    more = {} if format == "auto" else {"recipe": "none"}
    chosen, lines = load(torch.float8_e4m3fn, format, **more)
    assert (chosen, lines) == ("as_stored" if format == "auto" else format, [])


def test_recipe_and_keep_count_for_a_file_of_16_bits(load):
    assert load(torch.bfloat16, recipe="none", keep="head") == (BEST, [])
