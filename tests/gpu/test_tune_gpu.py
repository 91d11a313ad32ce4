"""`lowbit tune` from end to end, in a cache of its own, and what a fresh process makes of it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lowbit.ops import tuning, tuning_file
from lowbit.ops.attention import router, ways
from lowbit.ops.attention.table import MAX_ERROR
from lowbit.ops.scaled_mm import tiles
from lowbit.ops.tuning import Entry

M, N, K = 512, 3072, 3072
SECONDS = 60
# Starting Python and Triton, and the last race, come on top.
TIMEOUT = 300

# Prints, as JSON: by type, the tile that is taken; by format, whether the result is near float64's,
# and which backends give the very same result.
TAKEN = f"""
import json, torch
from lowbit.ops import registry, tuning
from lowbit.ops.linear import linear
from lowbit.ops.scaled_mm import tiles
from lowbit.quant import formats
device = torch.device("cuda", 0)
gpu = tuning.gpu(device)
generator = torch.Generator(device).manual_seed(0)
x = torch.randn({M}, {K}, generator=generator, device=device).bfloat16()
dense = torch.randn({N}, {K}, generator=generator, device=device) * 0.02
found = {{"tiles": {{}}, "errors": {{}}, "same": {{}}}}
for integer in (True, False):
    tile = tiles.choose(gpu.capability, gpu.processors, {M}, {N}, {K}, integer, gpu=gpu)
    found["tiles"][tiles.scheme(integer)] = str(tile)
for name in ("int8", "int8_convrot", "fp8_e4m3", "fp8_e4m3_rowwise"):
    fmt = formats.get(name)
    weight = fmt.quantize(dense)
    got = linear(x, weight)
    want = x.double() @ weight.dequantize().double().t()
    error = ((got.double() - want).norm() / want.norm()).item()
    # The activation is rounded as a weight of the format with one scale per row is.
    like = "fp8_e4m3_rowwise" if name.startswith("fp8") else name
    bound = formats.get(like).max_error + torch.finfo(torch.bfloat16).eps + 2**-10
    found["errors"][fmt.layout.scheme] = [error, bound]
    results = {{name: linear(x, weight, None, name) for name in ("triton", "reference")}}
    same = [name for name, result in results.items() if torch.equal(got, result)]
    found["same"][fmt.layout.scheme] = same
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


def run(cache, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv],
        env={**os.environ, "LOWBIT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def taken(cache) -> dict:
    """What a fresh process takes; its results are near float64's."""
    done = run(cache, "-c", TAKEN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(error <= bound for error, bound in found["errors"].values()), found["errors"]
    return found


@pytest.fixture(scope="module")
def report(cache):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    argv = ("tune", "--shape", f"{M},{N},{K}", "--max-seconds", str(SECONDS), "--bits", "8")
    done = run(cache, "-m", "lowbit", *argv, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(done.stdout)
    return found


def test_everything_is_measured_and_nothing_is_wrong(report):
    assert report["unreached"] == 0
    assert {r["op"] for r in report["results"]} == {"scaled_mm", "linear"}
    for result in report["results"]:
        assert not result["note"] and not result["wrong"], result
        assert result["default"] in result["times_ms"], result
        assert result["tried"] > 1, result
        if result["op"] == "linear":
            assert "bf16 F.linear" in result["times_ms"]


def test_winners_are_what_a_fresh_process_takes(report, cache):
    found = taken(cache)
    for result in report["results"]:
        choice = result["winner"] or result["default"]
        if result["op"] == "scaled_mm":
            assert found["tiles"][result["scheme"]] == choice
        elif choice in ("triton", "reference"):
            assert choice in found["same"][result["scheme"]]


def test_file_holds_the_winners_alone(report, cache):
    sections = tuning_file.read(cache / tuning_file.FILE)
    stored = {(part.mark["op"], *e.key) for part in sections for e in part.entries}
    won = {(r["op"], r["scheme"], r["n"], r["k"], r["m"]) for r in report["results"] if r["winner"]}
    assert stored == won
    shown = run(cache, "-m", "lowbit", "tune", "--show")
    assert shown.returncode == 0 and f"{len(won)} result" in shown.stdout


def test_entries_are_taken_up_whatever_won(cache, tmp_path, monkeypatch):
    """A tile and a backend that nothing else would choose here."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    gpu = tuning.gpu(torch.device("cuda", 0))
    tile = tiles.Tile(64, 32, 64, group_m=2, stages=2)
    for scheme in ("int8", "fp8"):
        entry = Entry(scheme, N, K, M, M, tiles.as_choice(tile), 1.0, {}, 2.0)
        tuning.save("scaled_mm", gpu, {entry.key: entry})
    entry = Entry("int8_row_convrot", N, K, M, M, "reference", 1.0, "triton", 2.0)
    tuning.save("linear", gpu, {entry.key: entry})
    found = taken(tmp_path)
    assert set(found["tiles"].values()) == {"64x32x64 w4 s2 g2 p1"}
    assert found["same"]["int8_row_convrot"] == ["reference"]
    assert "reference" not in found["same"]["int8_row"]
    tuning.forget()


# Prints, as JSON: by format, the errors of W4A16 and of what `auto` takes, for a few tokens.
FOUR_BITS = f"""
import json, torch
from lowbit.ops.linear import linear
from lowbit.quant import formats
generator = torch.Generator("cuda").manual_seed(0)
dense = torch.randn({N}, {K}, generator=generator, device="cuda") * 0.02
found = {{}}
for name in ("nvfp4", "mxfp4"):
    weight = formats.get(name).quantize(dense)
    for rows in (2, 9, 16):
        x = torch.randn(rows, {K}, generator=generator, device="cuda").bfloat16()
        want = x.double() @ weight.dequantize().double().t()
        for way in ("w4a16", "auto"):
            got = linear(x, weight, None, way)
            found[f"{{name}} {{rows}} {{way}}"] = ((got - want).norm() / want.norm()).item()
print(json.dumps(found))
"""


def test_tiles_and_backends_of_4_bits_are_measured_right_and_taken(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    argv = ("tune", "--shape", f"16,{N},{K}", "--bits", "4", "--max-seconds", "40", "--json")
    done = run(tmp_path, "-m", "lowbit", *argv)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {r["op"] for r in results} == {"fp4_mm", "linear"}
    for result in results:
        assert not result["note"] and not result["wrong"] and result["tried"] > 1, result
    won = {(r["op"], r["scheme"]) for r in results if r["winner"]}
    sections = tuning_file.read(tmp_path / tuning_file.FILE)
    stored = {(part.mark["op"], e.scheme) for part in sections for e in part.entries}
    assert stored == won
    print(done.stdout)
    done = run(tmp_path, "-c", FOUR_BITS)
    assert done.returncode == 0, done.stderr
    for name, error in json.loads(done.stdout).items():
        assert error <= (0.004 if name.endswith("w4a16") else 0.035), (name, error)


def test_dry_run_keeps_nothing(tmp_path):
    argv = ("tune", "--shape", "16,1024,1024", "--max-seconds", "20", "--dry-run")
    done = run(tmp_path, "-m", "lowbit", *argv)
    assert done.returncode == 0, done.stderr
    assert "not remembered: --dry-run" in done.stdout
    assert not (tmp_path / tuning_file.FILE).exists()


TEXT, TOKENS = 512, 2048


def test_attention_that_is_stored_is_what_auto_takes_and_is_right(tmp_path, monkeypatch):
    done = run(tmp_path, "-m", "lowbit", "tune", "--attention", f"{TEXT},{TOKENS}", "--json")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    results = json.loads(done.stdout)["results"]
    sizes = [(scheme, n) for n in (TEXT, TOKENS) for scheme in ("unmasked", "keys")]
    assert [(r["scheme"], r["m"]) for r in results] == sizes
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_used", {})
    tuning.forget()
    for result in results:
        assert not result["note"] and not result["wrong"] and not result["untried"], result
        assert result["tried"] > 1 and "sdpa" in result["times_ms"]
        assert all(result["errors"][way] <= MAX_ERROR for way in result["ranking"])
        check_auto(result)
    tuning.forget()


def check_auto(result: dict) -> None:
    """`auto` takes the winner, and in 16 bits the first that has them, and agrees with torch."""
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(1, length, 4, 128) for length in (result["rows"], result["n"], result["n"])]
    made = (torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes)
    q, k, v = (x.transpose(1, 2) for x in made)
    mask = None
    if result["scheme"] == "keys":
        mask = torch.ones(1, 1, 1, result["n"], dtype=torch.bool, device="cuda")
        mask[..., 100:200] = False
    ranking = [*result["ranking"], "sdpa"]
    assert router.choose(q, k, v, "auto", mask) == ranking[0]
    exact = next(way for way in ranking if ways.bits(way) == 16)
    assert router.choose(q, k, v, "auto", mask, bits_min=16) == exact
    want = ways.sdpa(q.float(), k.float(), v.float(), mask, False, None)
    assert ways.relative_error(router.route(q, k, v, mask=mask), want).item() <= MAX_ERROR
