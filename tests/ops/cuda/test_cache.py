"""Machine code on disk: what is found again, what is not, and what happens without a folder."""

import hashlib
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lowbit.ops.linear  # noqa: F401, registers its backends
from lowbit.ops import cache_folder, registry
from lowbit.ops.cuda import cache, nvrtc
from lowbit.ops.scaled_mm import OP, scaled_mm

from .compiled import library

SOURCE = 'extern "C" __global__ void one(int* x) { *x = NUMBER; }'
OPTIONS = ("--gpu-architecture=sm_90a", "-DNUMBER=1")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder, of which nothing was said."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "pack"))
    monkeypatch.setattr(cache, "_warned", set())
    return cache.folder()


@pytest.fixture
def compiler(monkeypatch) -> list[str]:
    """A compiler whose code tells what it was given: the sources that it compiled."""
    calls = []

    def compile_source(source, options):
        calls.append(source)
        return hashlib.sha512(repr((source, *options)).encode()).digest() * 16

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setattr(nvrtc, "_version", lambda: "13.0")
    return calls


def files(place: Path) -> list[Path]:
    return sorted(place.iterdir())


def test_the_second_process_finds_what_the_first_one_compiled(compiler, place):
    first = nvrtc.machine_code(SOURCE, OPTIONS)
    assert nvrtc.machine_code(SOURCE, list(OPTIONS)) == first
    assert compiler == [SOURCE]
    (file,) = files(place)
    assert file.read_bytes().endswith(first)


def test_whatever_the_code_depends_on_makes_another_file(compiler, place, monkeypatch):
    codes = [nvrtc.machine_code(SOURCE, OPTIONS)]
    codes.append(nvrtc.machine_code(SOURCE + " ", OPTIONS))
    codes.append(nvrtc.machine_code(SOURCE, OPTIONS[::-1]))
    codes.append(nvrtc.machine_code(SOURCE, (OPTIONS[0], "-DNUMBER=2")))
    codes.append(nvrtc.machine_code(SOURCE, (" ".join(OPTIONS),)))
    codes.append(nvrtc.machine_code(SOURCE, OPTIONS[:1]))
    assert len(set(codes)) == len(compiler) == len(files(place)) == 6
    for module, name in ((nvrtc, "_version"), (torch, "__version__"), (torch.version, "cuda")):
        new = (lambda: "13.1") if name == "_version" else "12.8"
        monkeypatch.setattr(module, name, new)
        assert nvrtc.machine_code(SOURCE, OPTIONS) == codes[0]
    assert len(compiler) == len(files(place)) == 9


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: cache.DIGEST_BYTES],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
    ids=["empty", "cut early", "no code", "cut", "longer", "code", "digest"],
)
def test_a_file_that_was_altered_is_compiled_anew_and_replaced(compiler, place, caplog, spoil):
    caplog.set_level(logging.DEBUG, cache.logger.name)
    code = nvrtc.machine_code(SOURCE, OPTIONS)
    (file,) = files(place)
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    assert nvrtc.machine_code(SOURCE, OPTIONS) == code
    assert len(compiler) == 2 and files(place) == [file] and file.read_bytes() == whole
    assert [r.levelname for r in caplog.records] == ["DEBUG"] and str(file) in caplog.text


def test_another_kernels_file_is_not_taken(compiler, place):
    nvrtc.machine_code(SOURCE, OPTIONS)
    (file,) = files(place)
    other = nvrtc.machine_code(SOURCE, OPTIONS[:1])
    (target,) = set(files(place)) - {file}
    target.write_bytes(file.read_bytes())
    assert nvrtc.machine_code(SOURCE, OPTIONS[:1]) == other
    assert len(compiler) == 3


def test_what_cannot_be_compiled_leaves_nothing(monkeypatch, place):
    def fail(source, options):
        raise nvrtc.NvrtcError("undefined")

    monkeypatch.setattr(nvrtc, "_version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_source", fail)
    with pytest.raises(nvrtc.NvrtcError, match="undefined"):
        nvrtc.machine_code(SOURCE, OPTIONS)
    assert not place.exists()


def a_file_in_the_way(place, monkeypatch):
    place.parent.write_text("")
    return str(place)


def forbidden(place, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(cache_folder, "make", refuse)
    return "Permission denied"


def full(place, monkeypatch):
    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    return "No space left"


def locked(place, monkeypatch):
    def busy(source, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(cache_folder, "REPLACE_WAIT_SECONDS", 0)
    return "Access is denied"


@pytest.mark.parametrize("trouble", [a_file_in_the_way, forbidden, full, locked])
def test_without_a_folder_kernels_are_compiled_and_the_reason_is_said_once(
    compiler, place, caplog, monkeypatch, trouble
):
    want = nvrtc.compile_source(SOURCE, OPTIONS)
    reason = trouble(place, monkeypatch)
    for _ in range(2):
        assert nvrtc.machine_code(SOURCE, OPTIONS) == want
    assert nvrtc.machine_code(SOURCE + " ", OPTIONS) != want
    assert len(compiler) == 4
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(place) in caplog.text and reason in caplog.text
    assert not list(place.glob("*"))


def test_a_folder_that_can_only_be_read_is_read(compiler, place, caplog, monkeypatch):
    code = nvrtc.machine_code(SOURCE, OPTIONS)
    full(place, monkeypatch)
    assert nvrtc.machine_code(SOURCE, OPTIONS) == code
    assert len(compiler) == 1 and not caplog.records


def test_the_hosts_folder_is_taken_unless_another_is_named(compiler, place, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_host", [])
    cache.keep_in(tmp_path / "host")
    assert cache.folder() == place
    monkeypatch.delenv("LOWBIT_CACHE")
    nvrtc.machine_code(SOURCE, OPTIONS)
    assert len(files(tmp_path / "host" / "nvrtc")) == 1 and not place.exists()


def test_without_a_home_no_folder_of_that_name_is_read(compiler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "~no-such-user" / "cache"))
    code = nvrtc.machine_code(SOURCE, OPTIONS)
    monkeypatch.setenv("LOWBIT_CACHE", "~no-such-user/cache")
    assert cache.folder().is_dir() and nvrtc.machine_code(SOURCE, OPTIONS) == code
    assert len(compiler) == 2


def test_files_are_for_all_whom_the_user_lets_read(compiler, place):
    old = os.umask(0o022)
    nvrtc.machine_code(SOURCE, OPTIONS)
    os.umask(old)
    (file,) = files(place)
    assert sys.platform == "win32" or file.stat().st_mode & 0o777 == 0o644


def aged(place: Path, count: int) -> list[Path]:
    """Files of so many kernels, the oldest first, an hour between them."""
    found = []
    for i in range(1, count + 1):
        nvrtc.machine_code(f"{SOURCE}//{i}", OPTIONS)
        (new,) = set(files(place)) - set(found)
        found.append(new)
        os.utime(new, (3600 * i, 3600 * i))
    return found


def test_the_oldest_files_go_beyond_a_number(compiler, place, monkeypatch):
    monkeypatch.setattr(cache, "MOST_FILES", 3)
    found = aged(place, 3)
    nvrtc.machine_code(SOURCE, OPTIONS)
    assert found[0] not in files(place) and set(found[1:]) < set(files(place))
    assert len(files(place)) == 3
    nvrtc.machine_code(f"{SOURCE}//1", OPTIONS)
    assert len(compiler) == 5


def test_the_oldest_files_go_beyond_a_size_with_what_was_left_half_written(
    compiler, place, monkeypatch
):
    found = aged(place, 2)
    size = found[0].stat().st_size
    left, begun = (found[1].with_name(f"{found[1].name}.{i}.part") for i in range(2))
    for file in (left, begun):
        file.write_bytes(bytes(size))
    os.utime(left, (0, 0))
    foreign = place / "notes.txt"
    foreign.write_bytes(bytes(4 * size))
    os.utime(foreign, (0, 0))
    monkeypatch.setattr(cache, "MOST_BYTES", 3 * size)
    nvrtc.machine_code(SOURCE, OPTIONS)
    assert not left.exists() and begun.exists() and foreign.exists()
    assert set(found) < set(files(place))


def test_old_files_that_cannot_be_removed_are_no_error(compiler, place, caplog, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    aged(place, 2)
    monkeypatch.setattr(cache, "MOST_FILES", 1)
    monkeypatch.setattr(Path, "unlink", refuse)
    code = nvrtc.machine_code(SOURCE, OPTIONS)
    assert nvrtc.machine_code(SOURCE, OPTIONS) == code
    assert len(compiler) == 3 and not caplog.records


def test_threads_may_compile_the_same_kernels_at_once(compiler, place):
    kinds = [(f"-DNUMBER={i % 4}",) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda options: nvrtc.machine_code(SOURCE, options), kinds))
    assert codes == [codes[i % 4] for i in range(64)] and len(set(codes)) == 4
    assert len(files(place)) == 4


# Keeps kernels and asks for them again, some of which another process replaces and removes.
MANY = """
from lowbit.ops.cuda import cache

cache.MOST_FILES = 3
for i in range(100):
    code = bytes([i % 5]) * 50000
    assert cache.kept([str(i % 5)], lambda: code) == code
"""


def test_processes_may_keep_the_same_kernels_at_once(place):
    runs = [subprocess.Popen([sys.executable, "-c", MANY], stderr=subprocess.PIPE) for _ in "ab"]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0 and b"cannot be kept" not in error, error.decode()
    assert files(place) and all(file.suffix == cache.SUFFIX for file in files(place))
    assert all(cache._read(file) for file in files(place))


def test_compiled_graphs_call_it_from_within_their_operations(compiler, monkeypatch):
    """torch.compile could not trace what it does with files."""
    (reference,) = (b for b in registry.backends(OP) if b.name == "reference")

    def run(*arguments):
        assert not torch.compiler.is_compiling()
        assert len(nvrtc.machine_code(SOURCE, OPTIONS)) == 1024
        return reference.run(*arguments)

    backend = registry.Backend(OP, "cuda", 0, registry.Needs(frozenset()), run)
    monkeypatch.setattr(registry, "select", lambda *call: backend)
    a, b, one = (
        torch.ones(4, 32, dtype=torch.int8),
        torch.ones(16, 32, dtype=torch.int8),
        torch.ones(1),
    )
    graph = torch.compile(scaled_mm, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(graph(a, b, one, one), torch.full((4, 16), 32).bfloat16())
    assert compiler == [SOURCE]


@pytest.fixture
def real(monkeypatch):
    """NVRTC from its package, as if it were torch's."""
    found = library()
    if found is None:
        pytest.skip("the package nvidia-cuda-nvrtc is missing")
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: found)
    nvrtc._version.cache_clear()
    yield
    nvrtc._version.cache_clear()


def test_nvrtc_compiles_once(real, place, monkeypatch):
    assert re.fullmatch(r"\d+\.\d+", nvrtc._version())
    code = nvrtc.machine_code(SOURCE, OPTIONS)
    assert code == nvrtc.compile_source(SOURCE, OPTIONS) and code.startswith(b"\x7fELF")
    monkeypatch.delattr(nvrtc, "compile_source")
    assert nvrtc.machine_code(SOURCE, OPTIONS) == code


def test_the_log_comes_from_nvrtc(real, place):
    with pytest.raises(nvrtc.NvrtcError, match="undefined"):
        nvrtc.machine_code("int x = y;", ())
    assert not place.exists()
