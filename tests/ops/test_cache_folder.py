"""The pack's folder of caches: where it lies, and how files are written to it."""

import os
import sys
from pathlib import Path

import pytest

from lowbit.ops import cache_folder


def test_a_reader_on_windows_delays_the_writer(tmp_path, monkeypatch):
    file, new = tmp_path / "file", tmp_path / "new"
    tries = []
    replace = os.replace

    def busy(source, target):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError("in use by another process")
        replace(source, target)

    new.write_text("content")
    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(cache_folder, "REPLACE_WAIT_SECONDS", 0)
    with pytest.raises(PermissionError):
        cache_folder.replace(new, file)
    monkeypatch.setattr(sys, "platform", "win32")
    cache_folder.replace(new, file)
    assert len(tries) == 3 and file.read_text() == "content"


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, "/home/me/.cache/lowbit"),
        ("linux", {"XDG_CACHE_HOME": "/data/cache"}, "/data/cache/lowbit"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/lowbit"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/lowbit"),
        ("darwin", {"XDG_CACHE_HOME": "/data/cache"}, "/home/me/Library/Caches/lowbit"),
        ("win32", {"LOCALAPPDATA": "/Users/me/Local"}, "/Users/me/Local/lowbit"),
        ("win32", {}, "/home/me/AppData/Local/lowbit"),
        ("linux", {"LOWBIT_CACHE": "/mine", "XDG_CACHE_HOME": "/data"}, "/mine"),
        ("win32", {"LOWBIT_CACHE": "~/mine"}, "/home/me/mine"),
    ],
)
def test_folder_is_the_users_for_caches(monkeypatch, platform, environment, folder):
    for name in ("LOWBIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder.folder() == Path(folder)


def test_a_user_without_a_home_gets_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWBIT_CACHE", "~no-such-user/cache")
    with pytest.raises(FileNotFoundError, match="set LOWBIT_CACHE"):
        cache_folder.write(cache_folder.folder() / "file", b"")
    assert not list(tmp_path.iterdir())
