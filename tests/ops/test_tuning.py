"""What operations ask of `lowbit tune`'s results, and what they make of them."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch

from lowbit.ops import registry, tuning, tuning_file
from lowbit.ops.registry import Backend, Call, Needs
from lowbit.ops.scaled_mm import tiles
from lowbit.ops.tuning import BUCKETS, Entry, Gpu

H200 = Gpu("NVIDIA H200", (9, 0), 132)
CPU = torch.device("cpu")
TILE = tiles.Tile(64, 64, 128, group_m=4, warps=4, stages=5, tma=True, per_sm=2)
TILE_ENTRY = Entry("int8", 3072, 3072, 512, 512, tiles.as_choice(TILE), 0.02, {}, 0.03)
ENTRY = Entry("int8_row", 48, 64, 512, 512, "slow", 0.5, "fast", 0.75)


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    """A cache of this test's own, and nothing remembered before and after."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_used", {})
    tuning.forget()
    tuning._warn.cache_clear()
    yield
    tuning.forget()


def save(op: str, *entries: Entry, gpu: Gpu = H200) -> None:
    tuning.save(op, gpu, {entry.key: entry for entry in entries})


def choose(m: int, gpu: Gpu | None = H200, n: int = 3072, **options) -> tiles.Tile:
    return tiles.choose(H200.capability, H200.processors, m, n, 3072, True, gpu=gpu, **options)


@pytest.mark.parametrize(
    ("m", "found"), [(1, 1), (2, 16), (16, 16), (17, 32), (512, 512), (513, 768), (32760, 32768)]
)
def test_rows_belong_to_the_least_bucket_that_holds_them(m, found):
    assert tuning.bucket(m) == found
    least, greatest = tuning.bucket_rows(found)
    assert least <= m <= greatest


def test_beyond_the_last_bucket_nothing_is_tuned():
    assert tuning.bucket(BUCKETS[-1]) == BUCKETS[-1]
    assert tuning.bucket(BUCKETS[-1] + 1) is None


def test_buckets_leave_no_gap():
    ends = [tuning.bucket_rows(m) for m in BUCKETS]
    assert ends[0][0] == 1
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(ends))


def test_tuned_tile_goes_before_the_table_for_its_bucket_alone():
    table = choose(512)
    save("scaled_mm", TILE_ENTRY)
    assert choose(512) == choose(257) == TILE != table
    assert choose(256) == choose(256, None)
    assert choose(513) == choose(513, None)
    assert choose(512, n=5120) == choose(512, None, n=5120)
    assert choose(512, None) == table


def test_tile_that_is_too_large_for_a_float32_result_is_passed_over():
    wide = tiles.Tile(128, 256, 128, warps=8, tma=True)
    save("scaled_mm", dataclasses.replace(TILE_ENTRY, choice=tiles.as_choice(wide)))
    assert choose(512) == wide
    assert choose(512, wide=True) == choose(512, None, wide=True) != wide


@pytest.mark.parametrize(
    "gpu",
    [
        dataclasses.replace(H200, name="NVIDIA H100"),
        dataclasses.replace(H200, processors=114),
        dataclasses.replace(H200, capability=(8, 0)),
    ],
    ids=str,
)
def test_entries_count_on_their_kind_of_gpu_alone(gpu):
    save("scaled_mm", TILE_ENTRY)
    assert tuning.lookup("scaled_mm", H200) and not tuning.lookup("scaled_mm", gpu)
    assert not tuning.lookup("linear", H200) and not tuning.lookup("scaled_mm", None)


@pytest.mark.parametrize(
    ("op", "name", "counts"),
    [
        ("scaled_mm", "triton", False),
        ("scaled_mm", "torch", True),
        ("linear", "triton", False),
        ("linear", "comfy-kitchen", False),
    ],
)
def test_entries_count_with_the_versions_they_were_measured_with(monkeypatch, op, name, counts):
    save(op, TILE_ENTRY)
    version = tuning.importlib.metadata.version
    monkeypatch.setattr(
        tuning.importlib.metadata, "version", lambda n: "0.0" if n == name else version(n)
    )
    tuning.forget()
    assert bool(tuning.lookup(op, H200)) == counts


def test_entries_do_not_survive_a_change_of_the_kernel(monkeypatch, tmp_path):
    sources = tmp_path / "scaled_mm"
    sources.mkdir()
    (sources / "kernel.py").write_text("one")
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    tuning.source_hash.cache_clear()
    save("scaled_mm", TILE_ENTRY)
    assert tuning.lookup("scaled_mm", H200)
    (sources / "kernel.py").write_text("two")
    tuning.source_hash.cache_clear()
    tuning.forget()
    assert not tuning.lookup("scaled_mm", H200)
    (sources / "kernel.py").write_bytes(b"one")
    (sources / "kernel_epilogue.py").write_text("")
    tuning.source_hash.cache_clear()
    tuning.forget()
    assert not tuning.lookup("scaled_mm", H200)
    monkeypatch.undo()
    tuning.source_hash.cache_clear()


def test_ends_of_lines_are_no_change(monkeypatch, tmp_path):
    sources = tmp_path / "scaled_mm"
    sources.mkdir()
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    hashes = set()
    for text in (b"a\nb\n", b"a\r\nb\r\n"):
        (sources / "kernel.py").write_bytes(text)
        tuning.source_hash.cache_clear()
        hashes.add(tuning.source_hash("scaled_mm"))
    assert len(hashes) == 1
    tuning.source_hash.cache_clear()


@pytest.mark.parametrize("op", tuning.SOURCES)
def test_every_source_is_there(op):
    here = tuning.Path(tuning.__file__).parent
    assert all(list(here.glob(pattern)) for pattern in tuning.SOURCES[op])


def test_unreadable_file_is_told_of_once_and_then_as_none(caplog):
    tuning_file.path().write_text("{")
    for _ in range(3):
        assert choose(512) == choose(512, None)
        tuning.forget()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(tuning_file.path()) in caplog.text and "lowbit tune" in caplog.text
    assert str(tuning_file.path()) in tuning.stored()[1]


def test_folder_in_the_files_place_is_no_crash(caplog):
    tuning_file.path().mkdir()
    assert choose(512) == choose(512, None)
    assert "ignored" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"block_m": 48},
        {"block_m": 1024},
        {"block_k": "128"},
        {"warps": 3},
        {"stages": 0},
        {"per_sm": -1},
        {"group_m": True},
        {"tma": 1},
        {"colour": "red"},
    ],
    ids=str,
)
def test_tile_that_cannot_be_one_is_ignored_with_a_warning(changed, caplog):
    choice = {**tiles.as_choice(TILE), **changed}
    save("scaled_mm", dataclasses.replace(TILE_ENTRY, choice=choice))
    assert choose(512) == choose(512, None)
    assert "lowbit tune" in caplog.text
    with pytest.raises(ValueError, match="tile"):
        tiles.from_choice(choice)


@pytest.mark.parametrize("rows", tiles.TABLE.values(), ids=lambda rows: str(len(rows)))
def test_every_tile_of_the_table_can_be_stored(rows):
    for row in rows:
        for tile in row.tiles:
            choice = json.loads(json.dumps(tiles.as_choice(tile)))
            assert tiles.from_choice(choice) == dataclasses.replace(tile, rate=1.0)


def test_used_entries_go_before_the_file_and_are_not_written():
    save("scaled_mm", TILE_ENTRY)
    tuning.use("scaled_mm", H200, {TILE_ENTRY.key: None})
    assert choose(512) == choose(512, None)
    other = dataclasses.replace(TILE, stages=4)
    entry = dataclasses.replace(TILE_ENTRY, choice=tiles.as_choice(other))
    tuning.use("scaled_mm", H200, {entry.key: entry})
    assert choose(512) == other
    assert tuning.stored()[0][0].entries == (TILE_ENTRY,)


def test_no_device_but_a_gpu_has_a_kind():
    assert tuning.gpu(CPU) is None and tuning.gpu(torch.device("meta")) is None


def test_entries_are_found_in_a_fresh_process():
    save("scaled_mm", TILE_ENTRY)
    code = (
        "from lowbit.ops import tuning\nfrom lowbit.ops.scaled_mm import tiles\n"
        f"gpu = tuning.{H200!r}\n"
        "tile = tiles.choose(gpu.capability, gpu.processors, 512, 3072, 3072, True, gpu=gpu)\n"
        f"assert tile == tiles.{TILE!r}, tile"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_reads_no_file():
    code = (
        "import lowbit.ops.tuning_file as file\n"
        "def fail(*args): raise AssertionError('read at import')\n"
        "file.read = fail\n"
        "import lowbit.ops.linear, lowbit.ops.scaled_mm, lowbit.quant.tune\n"
        "from lowbit.ops import tuning\n"
        "assert tuning.stored.cache_info().currsize == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def backends(monkeypatch):
    """Two backends of `linear` for one scheme, on a CPU that passes for a GPU."""
    monkeypatch.setattr(tuning, "gpu", lambda device: H200)
    found = {}
    monkeypatch.setattr(registry, "_BACKENDS", found)
    tuning.forget()

    def add(name: str, rank: int, **needs) -> None:
        wants = Needs(frozenset({"int8_row"}), **needs)
        registry.register(Backend("linear", name, rank, wants, lambda: name))

    add("fast", 10)
    add("slow", 100)
    return add


def selected(m: int, name: str = "auto", n: int = 48) -> str:
    bucket = tuning.bucket_if_tuned("linear", "int8_row", CPU, n, 64, m)
    return registry.select("linear", Call("int8_row", CPU, n, 64, bucket), name).name


def test_auto_takes_the_backend_that_was_measured_faster_for_that_bucket(backends):
    assert selected(512) == "fast"
    save("linear", ENTRY)
    assert [selected(m) for m in (256, 257, 512, 513)] == ["fast", "slow", "slow", "fast"]
    assert selected(512, n=64) == "fast"


def test_named_backend_is_taken_whatever_was_measured(backends):
    save("linear", ENTRY)
    assert selected(512, "fast") == "fast"


def test_backend_that_cannot_run_is_not_taken_though_it_was_faster(backends):
    backends("gone", 50, package="no_such_package")
    save("linear", dataclasses.replace(ENTRY, choice="gone"))
    assert selected(512) == "fast"


@pytest.mark.parametrize("choice", ["unknown", None, {"block_m": 16}, 3])
def test_choice_that_is_no_backend_is_passed_over(backends, choice):
    save("linear", dataclasses.replace(ENTRY, choice=choice))
    assert selected(512) == "fast"


def test_faster_backend_needs_no_other_measurement(backends, monkeypatch):
    """`auto` leaves our kernels out where nobody measured them; `lowbit tune` is a measurement."""
    monkeypatch.setattr(registry, "capability", lambda device: (8, 9))
    backends("named only", 5, measured=((9, 0), (10, 0)))
    assert selected(512) == "fast"
    save("linear", dataclasses.replace(ENTRY, choice="named only"))
    assert selected(512) == "named only"


def test_choice_is_told_once_for_a_shape(backends, caplog):
    save("linear", ENTRY)
    with caplog.at_level("INFO", logger=registry.__name__):
        for m in range(257, 513):
            selected(m)
    assert [r.getMessage() for r in caplog.records] == [
        "linear int8_row [48, 64], M up to 512, on cpu: slow, measured faster than fast"
    ]


def test_rows_make_no_difference_to_a_weight_without_entries(backends):
    save("linear", ENTRY)
    for m in range(1, 1000):
        selected(m, n=64)
    assert registry.select.cache_info().currsize == 1
