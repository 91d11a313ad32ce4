import dataclasses
import json

import pytest
import torch

from lowbit.ops import tuning, tuning_file
from lowbit.ops.tuning import Entry, Gpu
from lowbit.quant import tune
from lowbit.quant.tune import Problem, Report, Result
from tests.quant.tune import bench as fake

GPU = Gpu("NVIDIA H200", (9, 0), 132)
ENTRY = Entry("int8_row", 48, 64, 512, 512, "reference", 0.5, "triton", 0.75)
WON = Result(
    *("scaled_mm", "int8", 512, 512, 3072, 3072, "64x64x128 w4", "128x64x128 w4", 0.25),
    times_ms={"64x64x128 w4": 0.025, "128x64x128 w4": 0.02},
    tried=30,
    failed={"256x128x128 w4": "out of resource: shared memory"},
    untried=2,
)
LAYER = Result(
    *("linear", "int8_row", 512, 512, 3072, 3072, "triton"),
    times_ms={"triton": 0.03, tune.PLAIN: 0.02, "reference": 0.05},
    tried=2,
)
ATTENTION = Result(
    *("attention", "unmasked", 512, 8192, 512, 128, "sdpa", "lowbit_fp8", 0.5),
    times_ms={"sdpa": 0.3, "lowbit_fp8": 0.2, "cudnn": 0.25, "flash": 0.5},
    tried=4,
    failed={"kitchen_int8": "errs by 0.060, `auto` takes at most 0.045"},
    ranking=("lowbit_fp8", "cudnn"),
    errors={"lowbit_fp8": 0.0364, "sdpa": 0.002},
)
TAKEN = {"lowbit_fp8": 0.2, "lowbit_exact": 0.25}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    tuning.forget()
    tuning._warn.cache_clear()
    yield tmp_path
    tuning.forget()


@pytest.fixture
def measured(monkeypatch, cache):
    """Return a function that sets what `tune` reports, and a list of what it was called with."""
    calls = []

    def report(*results, unreached=0, absent=None):
        def fake(problems, bench, *, store, max_seconds, progress=None):
            calls.append((problems, store, max_seconds))
            path = str(tuning_file.path())
            return Report(GPU, path, store, 12.0, results, unreached, absent or {})

        bench = tune.Bench(torch.device("cpu"), GPU, None, None, (), ())
        monkeypatch.setattr(tune, "gpu_bench", lambda index: bench)
        monkeypatch.setattr(tune, "tune", fake)
        return calls

    return report


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("argv", [[], ["--shape", "512,64,64"], ["--dry-run"], ["--json"]])
def test_without_a_gpu_it_says_so(lowbit, argv):
    code, out, err = lowbit("tune", *argv)
    assert (code, out) == (2, "")
    assert (
        err == "lowbit: tune: torch sees no GPU here, and there is nothing to measure without one\n"
    )


def test_report_names_winners_and_what_stayed_slower_than_bf16(lowbit, measured):
    measured(WON, LAYER, unreached=3)
    code, out, _ = lowbit("tune", "--shape", "512,3072,3072")
    assert code == 0
    lines = out.splitlines()
    won = next(line for line in lines if "25% faster" in line)
    assert "int8 512 x 3072 x 3072" in won and "20.0 us" in won and "25.0 us" in won
    assert "32 candidates timed, 1 could not run, 0 gave wrong results, 2 not reached" in out
    assert "no time was left for 3 measurements" in out
    assert any("int8_row" in line and "30.0 us, bf16 20.0 us" in line for line in lines)
    assert lines[-1] == f"remembered in {tuning_file.path()}"


def test_dry_run_says_that_nothing_is_kept(lowbit, measured):
    calls = measured(WON)
    _, out, _ = lowbit("tune", "--shape", "512,3072,3072", "--dry-run", "--max-seconds", "5")
    assert calls == [([Problem(512, 3072, 3072)], False, 5.0)]
    assert out.splitlines()[-1] == "not remembered: --dry-run"


def test_wrong_result_is_bad_news(lowbit, measured):
    measured(dataclasses.replace(WON, wrong=("64x64x128 w4",)))
    code, out, _ = lowbit("tune", "--shape", "512,3072,3072")
    assert code == 1
    assert "WRONG RESULT, please report: int8 512 x 3072 x 3072: 64x64x128 w4" in out


def test_tile_that_replaces_one_that_cannot_run(lowbit, measured):
    measured(
        dataclasses.replace(WON, gain=float("inf"), times_ms={"128x64x128 w4": 0.02}),
        dataclasses.replace(LAYER, times_ms={}, note="not enough memory"),
    )
    _, out, _ = lowbit("tune", "--shape", "512,3072,3072")
    assert "cannot run" in out
    assert "not measured: int8_row 512 x 3072 x 3072: not enough memory" in out


def test_json_is_one_object(lowbit_json, measured):
    measured(WON, LAYER)
    code, found = lowbit_json("tune", "--shape", "512,3072,3072")
    assert code == 0 and found["gpu"]["name"] == GPU.name
    assert [r["winner"] for r in found["results"]] == ["128x64x128 w4", None]


def test_without_arguments_it_measures_attention_and_then_the_families(lowbit, measured):
    calls, problems = measured(), tune.problems
    lowbit("tune")
    assert calls[0][0] == [*problems.of_attention(), *problems.of_families()]
    assert calls[0][1:] == (True, 1800)


@pytest.mark.parametrize("argv", [["--rows", "7"], ["--bits", "8"], ["--shape", "512,64,64"]])
def test_what_is_of_linear_layers_measures_no_attention(lowbit, measured, argv):
    calls = measured()
    lowbit("tune", *argv)
    assert calls[0][0] and all(isinstance(problem, Problem) for problem in calls[0][0])


def test_attention_alone_of_all_or_of_some_tokens(lowbit, measured):
    calls = measured()
    lowbit("tune", "--attention")
    lowbit("tune", "--attention", "512,2048", "--dry-run")
    assert calls[0][0] == tune.problems.of_attention()
    assert calls[1][0] == [tune.Attention(8192, 512), tune.Attention(2048, 2048)]


def test_report_of_attention_names_ways_errors_and_what_was_left_out(lowbit, measured):
    slow = dataclasses.replace(ATTENTION, scheme="keys", winner=None, gain=0.0, ranking=())
    gone = dataclasses.replace(slow, m=1024, times_ms={}, note="not enough memory", failed={})
    measured(ATTENTION, slow, gone, absent={"sageattn": "sageattn: package is missing"})
    code, out, _ = lowbit("tune", "--attention")
    assert code == 0 and "faster than the built-in choice:" not in out
    first, second = (line.split() for line in out.splitlines() if "torch's own" in line)
    assert " ".join(second) == (
        "512 unmasked lowbit_fp8 200.0 us error 0.0364 torch's own: 300.0 us 50% faster then cudnn"
    )
    assert " ".join(first) == (
        "512 keys sdpa 300.0 us error 0.0020 torch's own: 300.0 us nothing is faster"
    )
    assert (
        "left out of attention: kitchen_int8: errs by 0.060, `auto` takes at most 0.045 "
        "(512 unmasked, 512 keys)" in out
    )
    assert "left out of attention: sageattn: package is missing" in out
    assert "not measured: attention keys 8192 x 512: not enough memory" in out
    assert "2 measurements" in out and "1 beat the built-in choice, 1 did not" in out


@pytest.mark.parametrize(("bits", "formats"), [("4", ("nvfp4",)), ("8", ("int8",))])
def test_bits_say_which_weights_are_measured(lowbit, measured, monkeypatch, bits, formats):
    measured()
    both, seen = fake.bench(formats=("int8", "nvfp4")), []
    monkeypatch.setattr(tune, "gpu_bench", lambda index: both)
    report = Report(GPU, "", True, 1.0, (), 0)
    monkeypatch.setattr(tune, "tune", lambda wanted, bench, **given: seen.append(bench) or report)
    lowbit("tune", "--shape", "512,64,64", "--bits", bits)
    assert [bench.formats for bench in seen] == [formats]


def test_model_and_rows_say_what_is_measured(lowbit, measured, wan):
    calls = measured()
    lowbit("tune", "--model", wan, "--rows", "7,5000")
    assert {p.m for p in calls[0][0]} == {7, 5000}
    assert {(p.n, p.k) for p in calls[0][0]} == {(256, 256), (512, 256), (256, 512)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "512,64"], "three whole numbers M,N,K are wanted"),
        (["--rows", "1,x"], "whole numbers M,M,... are wanted"),
        (["--rows", "0"], "1 to 131072 rows can be tuned"),
        (["--rows", "1", "--shape", "1,64,64"], "--shape names the rows itself"),
        (["--attention", "512", "--bits", "8"], "--attention measures none"),
        (["--attention", "--rows", "8"], "--attention measures none"),
        (["--attention", "--shape", "1,64,64"], "not allowed with argument"),
        (["--attention", "0"], "1 to 131072 tokens can be tuned"),
        (["--attention", "x"], "whole numbers"),
        (["--max-seconds", "0"], "it must be above zero"),
        (["--max-seconds", "nan"], "it must be above zero"),
        (["--model", "none.safetensors"], "none.safetensors"),
        (["--show", "--clear"], "not allowed with argument"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(lowbit, measured, argv, message):
    measured()
    code, out, err = lowbit("tune", *argv)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_show_tells_what_is_remembered_and_that_it_is_not_for_here(lowbit, lowbit_json):
    tuning.save("linear", GPU, {ENTRY.key: ENTRY})
    code, out, _ = lowbit("tune", "--show")
    assert code == 0
    assert f"{tuning_file.path()}: 1 result\n" in out
    assert "not in use here: op linear, gpu NVIDIA H200, capability 9.0" in out
    assert "int8_row 48 x 64" in out and "reference" in out and "instead of triton" in out
    _, found = lowbit_json("tune", "--show")
    assert found["count"] == 1 and found["sections"][0]["entries"][0]["choice"] == "reference"


def test_show_of_nothing_is_nothing(lowbit):
    assert lowbit("tune", "--show") == (0, f"{tuning_file.path()}: 0 results\n", "")


def test_show_tells_why_a_file_is_ignored(lowbit):
    tuning_file.path().write_text(json.dumps({"schema": 7, "sections": []}))
    code, out, _ = lowbit("tune", "--show")
    assert code == 0 and "schema 7" in out


def test_clear_forgets_everything(lowbit):
    tuning.save("linear", GPU, {ENTRY.key: ENTRY})
    assert lowbit("tune", "--clear") == (0, f"{tuning_file.path()}: 1 result removed\n", "")
    assert not tuning_file.path().exists()
    assert lowbit("tune", "--clear")[1] == f"{tuning_file.path()}: 0 results removed\n"


def test_doctor_tells_what_is_in_use(lowbit, lowbit_json, monkeypatch):
    assert "tuned" in lowbit("doctor")[1] and "nothing in use" in lowbit("doctor")[1]
    monkeypatch.setattr(tuning, "gpu", lambda device: GPU)
    tuning.save("linear", GPU, {ENTRY.key: ENTRY})
    assert f"0 tiles and 1 backend in use, from {tuning_file.path()}" in lowbit("doctor")[1]
    assert lowbit_json("doctor")[1]["tuned"] == {
        "path": str(tuning_file.path()),
        "problem": None,
        "tiles": 0,
        "backends": 1,
        "attention": 0,
    }


def test_show_and_doctor_tell_what_auto_of_attention_takes(lowbit, lowbit_json, monkeypatch):
    monkeypatch.setattr(tuning, "gpu", lambda device: GPU)
    ranking = [{"way": way, "ms": ms, "version": None} for way, ms in TAKEN.items()]
    for m, choice in ((512, ranking), (2048, [])):
        entry = Entry("unmasked", m, 128, m, 8192, choice, 0.2, "sdpa", 0.3)
        tuning.save("attention", GPU, {entry.key: entry})
    _, out, _ = lowbit("tune", "--show")
    shown = [" ".join(line.split()) for line in out.splitlines() if "tokens" in line]
    assert shown == [
        "unmasked 512 tokens and more lowbit_fp8, lowbit_exact 200.0 us instead of sdpa 300.0 us",
        "unmasked 2048 tokens and more sdpa 200.0 us instead of sdpa 300.0 us",
    ]
    out = lowbit("doctor")[1]
    assert "0 tiles and 0 backends, attention for 2 numbers of tokens in use" in out
    told = [" ".join(line.split()) for line in out.splitlines() if "tokens on" in line]
    assert told == [
        "no mask from 0 tokens on sdpa torch's own",
        "no mask from 512 tokens on lowbit_fp8 tuned",
        "no mask from 2048 tokens on sdpa tuned",
        "a mask of keys from 0 tokens on sdpa torch's own",
    ]
    found = lowbit_json("doctor")[1]
    assert found["tuned"]["attention"] == 2
    assert found["attention"][1] == {
        "hides": "unmasked",
        "tokens_min": 512,
        "way": "lowbit_fp8",
        "source": "tuned",
    }


def test_doctor_tells_why_nothing_is_in_use(lowbit, monkeypatch):
    tuning_file.path().write_text("{")
    monkeypatch.setattr(tuning, "gpu", lambda device: GPU)
    code, out, _ = lowbit("doctor")
    assert code == 0 and f"ignored: {tuning_file.path()}: it is no file of `lowbit tune`" in out


def test_from_the_command_to_the_file(lowbit, monkeypatch):
    """On a CPU that passes for a GPU: the reference in the kernel's place, and made-up times."""
    pytest.importorskip("triton", reason="Triton, whose errors tuning knows, is missing")
    monkeypatch.setattr(tune, "gpu_bench", lambda index: fake.bench(formats=("int8",)))
    monkeypatch.setattr(tune.products, "run_tile", fake.by_reference)
    monkeypatch.setattr(tuning, "gpu", lambda device: fake.GPU)
    monkeypatch.setattr(tuning, "_used", {})
    code, out, err = lowbit("tune", "--shape", "20,48,256", "--shape", "512,64,256")
    assert code == 0, err
    assert "tune 100%" in err
    assert "6 measurements" in out and "6 beat the built-in choice, 0 did not" in out
    assert "int8_row 20 x 48 x 256" in out and "built in: kitchen" in out
    _, out, _ = lowbit("tune", "--show")
    assert f"{tuning_file.path()}: 6 results\n" in out
    assert f" {fake.taken('int8', 20, 48, 256)} " in out and "{" not in out
    assert "4 tiles and 2 backends in use" in lowbit("doctor")[1]


def test_attention_from_the_command_to_what_doctor_tells(lowbit, monkeypatch):
    times = {"sdpa": 1.0, "lowbit_fp8": 0.5, "lowbit_exact": 0.75}
    ways = {"lowbit_fp8": None, "lowbit_exact": None, "flash": "flash: no GPU"}
    bench = dataclasses.replace(fake.bench(ms=times.get), ways=ways)
    monkeypatch.setattr(tune, "gpu_bench", lambda index: bench)
    monkeypatch.setattr(tuning, "gpu", lambda device: fake.GPU)
    monkeypatch.setattr(tuning, "_used", {})
    monkeypatch.setattr(tune.attention, "HEADS_MIN", 1)
    monkeypatch.setattr(tune.attention, "HEADS_MAX", 1)
    monkeypatch.setattr(tune.problems, "QUERIES_OF_TEXT", 128)
    code, out, err = lowbit("tune", "--attention", "64,200")
    assert code == 0, err
    assert "tuning 2 shapes on a GPU of tests" in out and "tune 100%" in err
    assert "4 measurements" in out and "4 beat the built-in choice" in out
    assert "left out of attention: flash: no GPU" in out
    assert out.count("lowbit_fp8") == 4 and out.count("then lowbit_exact") == 4
    _, out, _ = lowbit("tune", "--show")
    assert f"{tuning_file.path()}: 4 results\n" in out
    assert "from 64 tokens on  lowbit_fp8  tuned" in lowbit("doctor")[1]
