"""Where compiled kernels are kept: in ComfyUI's own folder where ComfyUI runs."""

import sys
import types

import pytest

from lowbit.nodes import host
from lowbit.ops import cache_folder
from lowbit.ops.cuda import cache


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_host", [])
    monkeypatch.delenv("LOWBIT_CACHE", raising=False)


def comfyui(monkeypatch, **functions) -> None:
    monkeypatch.setitem(sys.modules, "folder_paths", types.SimpleNamespace(**functions))


def test_kernels_lie_in_the_folder_that_comfyui_has_for_such_things(monkeypatch, tmp_path):
    comfyui(monkeypatch, get_system_user_directory=lambda name: str(tmp_path / f"__{name}"))
    host.keep_machine_code()
    assert cache.folder() == tmp_path / "__lowbit" / "nvrtc"


def test_without_such_a_folder_they_lie_in_the_users(monkeypatch):
    users = cache_folder.folder() / "nvrtc"
    comfyui(monkeypatch)
    host.keep_machine_code()
    assert cache.folder() == users
    monkeypatch.delitem(sys.modules, "folder_paths")
    host.keep_machine_code()
    assert cache.folder() == users
