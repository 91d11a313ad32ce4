import contextlib
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.quant.checkpoint import Checkpoint, CheckpointError, CheckpointWriter
from lowbit.quant.checkpoint.header import ALIGNMENT, DTYPES, LENGTH_BYTES, encode_header
from lowbit.quant.checkpoint.writer import ENTRY_BYTES, SMALL_BYTES

NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
BIG = torch.arange(SMALL_BYTES // 4 + 3, dtype=torch.int32)


@st.composite
def tensors(draw) -> torch.Tensor:
    """A tensor of any dtype and small shape, of random bits."""
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    high = 2 if dtype == torch.bool else 256
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist()


def write(path, contents: dict[str, torch.Tensor], metadata=None) -> None:
    # six bytes of JSON for each of at most two UTF-16 units per character
    names = sum(12 * len(name) + ENTRY_BYTES for name in contents)
    with CheckpointWriter(path, names_bytes=names, metadata_bytes=4096) as writer:
        for name, tensor in contents.items():
            writer.add(name, tensor)
        writer.finish(metadata or {})


def small_writer(path) -> CheckpointWriter:
    return CheckpointWriter(path, names_bytes=2000, metadata_bytes=100)


ANY = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@ANY
@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=8), st.dictionaries(NAMES, NAMES))
def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path, contents, metadata):
    path = tmp_path / "a.safetensors"
    write(path, contents, metadata)
    ours = Checkpoint(path)
    assert ours.metadata == metadata
    assert {n: bits(ours.read(n)) for n in ours} == {n: bits(t) for n, t in contents.items()}
    with safe_open(str(path), "pt") as theirs:
        assert set(theirs.keys()) == set(contents)
        assert (theirs.metadata() or {}) == metadata
        for name, tensor in contents.items():
            assert bits(theirs.get_tensor(name)) == bits(tensor)


@ANY
@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=8), st.dictionaries(NAMES, NAMES))
def test_what_safetensors_writes_is_read(tmp_path, contents, metadata):
    path = tmp_path / "a.safetensors"
    save_file(contents, path, metadata)
    ours = Checkpoint(path)
    assert ours.metadata == metadata
    assert {n: bits(ours.read(n)) for n in ours} == {n: bits(t) for n, t in contents.items()}


@ANY
@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=8))
def test_every_tensor_is_aligned_to_its_elements(tmp_path, contents):
    path = tmp_path / "a.safetensors"
    write(path, contents | {"big": torch.zeros(SMALL_BYTES, dtype=torch.uint8)})
    for info in Checkpoint(path).values():
        assert info.size_bytes == 0 or info.start % info.dtype.itemsize == 0


def test_small_tensors_lie_after_large_ones_widest_first(tmp_path):
    """A marker of odd length between two weights would leave the second misaligned."""
    marker, scale = torch.zeros(13, dtype=torch.uint8), torch.ones((), dtype=torch.float32)
    path = tmp_path / "a.safetensors"
    write(path, {"m.comfy_quant": marker, "m.scale": scale, "m.weight": BIG, "n.weight": BIG})
    tensors = Checkpoint(path)
    assert list(tensors) == ["m.weight", "n.weight", "m.scale", "m.comfy_quant"]
    assert all(info.start % ALIGNMENT == 0 for name, info in tensors.items() if BIG.nbytes % 8 == 0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)])
def test_each_dtype_and_shape_survives(tmp_path, dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    write(tmp_path / "a.safetensors", {"a": tensor})
    assert bits(Checkpoint(tmp_path / "a.safetensors").read("a")) == bits(tensor)


def test_strided_large_tensor_is_written_in_order(tmp_path):
    tensor = BIG[: 128 * 128].reshape(128, 128).t()
    write(tmp_path / "a.safetensors", {"a": tensor, "b": tensor[::2, ::3]})
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(checkpoint.read("a"), tensor)
    assert torch.equal(checkpoint.read("b"), tensor[::2, ::3])


@pytest.mark.parametrize("size", [4, SMALL_BYTES])
def test_tensor_may_change_after_it_was_added(tmp_path, size):
    tensor = torch.ones(size, dtype=torch.uint8)
    with small_writer(tmp_path / "a.safetensors") as writer:
        writer.add("a", tensor)
        tensor.zero_()
        writer.finish({})
    assert Checkpoint(tmp_path / "a.safetensors").read("a").all()


def test_parameter_is_written_as_its_values(tmp_path):
    write(tmp_path / "a.safetensors", {"a": torch.nn.Parameter(torch.ones(3))})
    assert Checkpoint(tmp_path / "a.safetensors").read("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [4, SMALL_BYTES])
def test_name_that_is_taken_is_refused(tmp_path, size):
    with small_writer(tmp_path / "a.safetensors") as writer:
        writer.add("a", torch.zeros(size, dtype=torch.uint8))
        with pytest.raises(CheckpointError, match=r"a.safetensors: tensor a is written twice"):
            writer.add("a", torch.zeros(1))


def test_reserved_name_and_unknown_dtype_are_refused_at_once(tmp_path):
    with small_writer(tmp_path / "a.safetensors") as writer:
        with pytest.raises(CheckpointError, match=r"tensor __metadata__ .* has no place"):
            writer.add("__metadata__", torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"tensor a of torch.complex64 has no place"):
            writer.add("a", torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize("existing", [None, b"as it was"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_the_folder_as_it_was(tmp_path, existing, error):
    path = tmp_path / "a.safetensors"
    if existing:
        path.write_bytes(existing)
    with pytest.raises(error), small_writer(path) as writer:
        writer.add("big", BIG)
        writer.add("small", torch.zeros(1))
        raise error
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([existing] if existing else [])


def test_without_finish_nothing_is_left(tmp_path):
    with small_writer(tmp_path / "a.safetensors") as writer:
        writer.add("big", BIG)
    assert list(tmp_path.iterdir()) == []


def test_until_finish_the_target_is_as_it_was_and_then_it_is_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"as it was")
    with small_writer(path) as writer:
        writer.add("big", BIG)
        assert path.read_bytes() == b"as it was"
        before = os.stat(path).st_ino
        writer.finish({})
    assert os.stat(path).st_ino != before
    assert torch.equal(Checkpoint(path).read("big"), BIG)
    assert list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def file_size_limit(limit: int):
    """Let the system refuse to make files longer than `limit` bytes, as a full disk would."""
    resource = pytest.importorskip("resource", reason="limits on files are of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [SMALL_BYTES // 4 + 3, 1])
def test_full_disk_is_reported_and_nothing_is_left(tmp_path, size):
    """Also when the bytes still wait in a buffer, which closing the file writes once more."""
    path = tmp_path / "a.safetensors"
    with (
        file_size_limit(4096),
        pytest.raises(CheckpointError, match=r"a.safetensors: File too large"),
        small_writer(path) as writer,
    ):
        writer.add("a", BIG[:size])
        writer.finish({})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "a.safetensors", {"a": BIG})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert os.stat(tmp_path / "a.safetensors").st_mode & 0o777 == 0o666 & ~umask


def test_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none/a.safetensors: there is no folder .*none$"):
        small_writer(tmp_path / "none" / "a.safetensors")


def test_target_that_is_a_folder_is_refused_and_nothing_is_left(tmp_path):
    path = tmp_path / "a.safetensors"
    path.mkdir()
    with (
        pytest.raises(CheckpointError, match=r"a.safetensors: Is a directory"),
        small_writer(path) as writer,
    ):
        writer.add("a", torch.zeros(1))
        writer.finish({})
    assert list(tmp_path.iterdir()) == [path]


def test_room_that_is_too_small_is_an_internal_error_and_nothing_is_left(tmp_path):
    with (
        pytest.raises(AssertionError, match="kept for the header"),
        CheckpointWriter(tmp_path / "a.safetensors", names_bytes=1, metadata_bytes=1) as writer,
    ):
        for i in range(100):
            writer.add(f"tensor {i}", torch.zeros(1))
        writer.finish({})
    assert list(tmp_path.iterdir()) == []


def test_room_for_an_entry_holds_the_longest_one():
    longest = (torch.float8_e4m3fn, (1 << 40,) * 5, 1 << 50, 1 << 51)
    one = encode_header({"a": longest}, {})
    two = encode_header({"a": longest, "b": longest}, {})
    assert len(two) - len(one) <= ENTRY_BYTES
    assert len(one) <= LENGTH_BYTES + ENTRY_BYTES + ALIGNMENT
