"""`auto` of attention where `lowbit tune` stored what was the fastest, on a CPU as a GPU."""

import dataclasses
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lowbit.nodes.attention_override import Override, read_call
from lowbit.ops import registry, tuning, tuning_file
from lowbit.ops.attention import KEYS, auto, router, ways
from lowbit.ops.attention.auto import BUILT_IN, TUNED, Ranked, Start
from lowbit.ops.tuning import Entry, Gpu

OP, CPU = "attention", torch.device("cpu")
GPU = Gpu("a GPU of tests", (8, 9), 128)
SAGE = Ranked("sageattn", 1.0, "2.2.0")
FP8, EXACT = Ranked("lowbit_fp8", 1.5, None), Ranked("lowbit_exact", 1.75, None)
CUDNN = Ranked("cudnn", 2.0, None)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A CPU that passes for a GPU on which everything runs, with a cache of its own."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_used", {})
    monkeypatch.setattr(tuning, "gpu", lambda device: GPU)
    monkeypatch.setattr(ways, "unmet", lambda *call: None)
    versions = {"sageattention": "2.2.0", "comfy_kitchen": "0.3"}
    plain = tuning.version
    monkeypatch.setattr(tuning, "version", lambda names: versions.get(names[0]) or plain(names))
    tuning.forget()
    yield versions
    monkeypatch.undo()
    tuning.forget()


def entry(tokens: int, *ranking: Ranked, scheme: str = "unmasked", k: int = 128) -> Entry:
    choice = auto.as_choice(ranking)
    return Entry(scheme, tokens, k, tokens, max(tokens, 8192), choice, 1.0, "sdpa", 3.0)


def save(*entries: Entry) -> None:
    tuning.save(OP, GPU, {e.key: e for e in entries})


def call(length: int, keys: int | None = None, h: int = 1, kv: int = 1, d: int = 128):
    q = torch.zeros(1, h, length, d, dtype=torch.bfloat16)
    k = torch.zeros(1, kv, keys or length, d, dtype=torch.bfloat16)
    return q, k, k


def chosen(length: int, mask=None, **given) -> str:
    options = {name: given.pop(name) for name in ("bits_min", "causal", "rotate") if name in given}
    return router.choose(*call(length, **given), "auto", mask, **options)


def test_row_holds_from_its_tokens_on_up_to_the_next():
    save(entry(64, CUDNN), entry(256), entry(512, SAGE, FP8))
    assert [chosen(n) for n in (63, 64, 255, 256, 511, 512, 9999)] == [
        *("sdpa", "cudnn", "cudnn", "sdpa", "sdpa", "sageattn", "sageattn")
    ]
    assert chosen(9999, keys=64) == chosen(64, keys=9999) == "cudnn"


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0))
    monkeypatch.setattr(auto, "fits", lambda row, *call: True)
    tuning.forget()


def test_stored_rows_come_before_those_of_the_table_with_as_many_tokens(hopper):
    save(entry(512), entry(4096, FP8), entry(16384, FP8))
    assert [chosen(n) for n in (255, 256, 511, 512, 4096, 16384)] == [
        *("sdpa", "cudnn", "cudnn", "sdpa", "lowbit_fp8", "lowbit_fp8")
    ]
    # What is measured from 4,096 tokens on is the same from 16,384 on.
    assert auto.starts(CPU, 128, None) == (
        Start(4096, "lowbit_fp8", TUNED),
        Start(512, "sdpa", TUNED),
        Start(256, "cudnn", BUILT_IN),
    )


@pytest.mark.parametrize("ranking", [(CUDNN,), ()], ids=["cudnn", "nothing"])
def test_few_tokens_that_were_measured_leave_the_table_to_more(hopper, ranking):
    save(entry(512, *ranking))
    few = "cudnn" if ranking else "sdpa"
    assert [chosen(n) for n in (512, 4096, 32760)] == [few, "lowbit_exact", "lowbit_fp8"]


def test_grouped_heads_have_the_table_alone(hopper):
    save(entry(64), entry(16384, SAGE))
    assert chosen(16384) == "sageattn" and chosen(64) == "sdpa"
    assert chosen(16384, h=4, kv=2) == "lowbit_fp8" and chosen(64, h=4, kv=2) == "sdpa"


def test_rows_of_one_way_are_one_row():
    save(*(entry(tokens, FP8) for tokens in range(16, 160, 16)), entry(160))
    assert auto.starts(CPU, 128, None) == (Start(160, "sdpa", TUNED), Start(16, FP8.way, TUNED))


def test_where_8_bits_are_not_wanted_the_next_of_16_is_taken():
    save(entry(64, SAGE, FP8, CUDNN), entry(512, SAGE, FP8))
    assert [chosen(n, bits_min=16) for n in (64, 512)] == ["cudnn", "sdpa"]
    assert [chosen(n) for n in (64, 512)] == ["sageattn", "sageattn"]


def test_where_q_and_k_are_to_be_rotated_what_does_not_is_passed_over():
    save(entry(64, SAGE, FP8, CUDNN), entry(512, SAGE, CUDNN, FP8), entry(1024, SAGE))
    assert [chosen(n, rotate=True) for n in (64, 512, 1024)] == ["lowbit_fp8", "cudnn", "sdpa"]
    q = torch.zeros(1, 64, 128, dtype=torch.bfloat16)
    assert Override("auto", rotate=True)._way(read_call(q, q, q, heads=1)) == "lowbit_fp8"


def test_mask_of_keys_has_rows_of_its_own():
    save(entry(64, SAGE), entry(64, FP8, scheme="keys"))
    of_keys, of_pairs = torch.ones(1, 1, 1, 64).bool(), torch.ones(1, 1, 64, 64).bool()
    assert chosen(64, of_keys) == "lowbit_fp8" and chosen(64) == "sageattn"
    assert chosen(64, of_pairs) == "sdpa"


@pytest.mark.parametrize("given", [{"d": 64}, {"causal": True}, {"h": 4, "kv": 2}], ids=str)
def test_what_was_not_measured_stays_as_it_was(given):
    save(entry(64, SAGE))
    assert chosen(64, **given) == "sdpa"


def test_way_that_cannot_run_any_more_goes_down_the_list(monkeypatch):
    save(entry(64, SAGE, FP8, CUDNN))
    reason = "sageattn: package sageattention is missing"
    monkeypatch.setattr(ways, "unmet", lambda way, *call: reason if way == "sageattn" else None)
    assert chosen(64) == "lowbit_fp8"


@pytest.mark.parametrize("version", ["missing", "2.3.0"])
def test_way_of_another_version_of_its_package_goes_down_the_list(gpu, version):
    save(entry(64, SAGE, FP8))
    gpu["sageattention"] = version
    tuning.forget()
    assert chosen(64) == "lowbit_fp8"


@pytest.mark.parametrize("name", ["torch", "triton", "source"])
def test_rows_count_with_the_versions_they_were_measured_with(monkeypatch, name):
    save(entry(64, FP8))
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    elif name == "triton":
        monkeypatch.setattr(tuning, "version", lambda names: "0.0")
    else:
        monkeypatch.setattr(tuning, "source_hash", lambda op: "another")
    tuning.forget()
    assert chosen(64) == "sdpa"


def test_rows_count_on_their_kind_of_gpu_alone(monkeypatch):
    save(entry(64, FP8))
    monkeypatch.setattr(tuning, "gpu", lambda device: dataclasses.replace(GPU, name="another"))
    tuning.forget()
    assert chosen(64) == "sdpa"
    monkeypatch.setattr(tuning, "gpu", lambda device: None)
    tuning.forget()
    assert chosen(64) == "sdpa"


@pytest.mark.parametrize(
    "choice",
    [
        "lowbit_fp8",
        ["lowbit_fp8"],
        [{"way": "fast", "ms": 1.0, "version": None}],
        [{"way": "lowbit_fp8", "ms": 1.0}],
        [{"way": "lowbit_fp4", "ms": 1.0, "version": None}],
        [{"way": ["lowbit_fp8"], "ms": 1.0, "version": None}],
        [{"way": "lowbit_fp8", "ms": "1", "version": None}],
        [{"way": "lowbit_fp8", "ms": 1.0, "version": 2}],
    ],
    ids=str,
)
def test_choice_that_auto_cannot_take_is_ignored_and_told(choice, caplog):
    save(dataclasses.replace(entry(64), choice=choice), entry(512, FP8))
    assert chosen(64) == "sdpa" and chosen(512) == "lowbit_fp8"
    assert "what was tuned of attention" in caplog.text and "Run `lowbit tune`" in caplog.text


def test_file_without_attention_is_read_as_ever():
    other = Entry("int8_row", 48, 64, 512, 512, "reference", 0.5, "triton", 0.75)
    tuning.save("linear", GPU, {other.key: other})
    assert chosen(64) == "sdpa"
    save(entry(64, FP8))
    assert tuning.lookup("linear", GPU) == {other.key: other}
    assert json.loads(tuning_file.path().read_text())["schema"] == 1
    assert chosen(64) == "lowbit_fp8"


def test_compiled_router_takes_what_is_stored_and_a_graph_is_for_all_tokens_of_a_row():
    save(entry(16, FP8), entry(32))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k: router.route(q, k, k), fullgraph=True, backend=counter)
    for length, graphs in ((17, 1), (20, 1), (31, 1), (32, 2), (50, 2), (18, 2)):
        q, k, _ = (torch.randn_like(x) for x in call(length))
        for x in (q, k):
            torch._dynamo.mark_dynamic(x, 2)
        want = router.route(q, k, k, "lowbit_fp8" if length < 32 else "sdpa")
        assert torch.equal(compiled(q, k), want)
        assert counter.frame_count == graphs


def test_override_and_its_prologue_follow_what_is_stored(monkeypatch):
    save(entry(16, SAGE, FP8, CUDNN), entry(32, FP8), entry(64))
    override = Override("auto")
    for length, way, prepares in ((16, "sageattn", False), (32, "lowbit_fp8", True)):
        q = torch.zeros(1, length, 128, dtype=torch.bfloat16)
        meant = read_call(q, q, q, heads=1)
        assert override._way(meant) == way and override.runs(meant)
        assert override.takes_prologue(meant) == prepares
        low = dataclasses.replace(meant, low=False)
        assert override.runs(low) == (length == 16)
    q = torch.zeros(1, 64, 128, dtype=torch.bfloat16)
    assert not override.runs(read_call(q, q, q, heads=1))


def test_schemes_are_of_kinds_that_ways_take():
    assert set(auto.SCHEMES) == {None, KEYS}
    assert auto.package_version("lowbit_fp8") is None
    assert auto.package_version("sageattn") == "2.2.0"


def told(monkeypatch, caplog, device: torch.device) -> list[str]:
    monkeypatch.setattr(auto, "fits", lambda *row: False)
    caplog.set_level("INFO")
    caplog.clear()
    auto.tell_of_unmeasured.cache_clear()
    for mode in ("auto", "auto", "sdpa"):
        router.check_runs(mode, device)
    auto.tell_of_unmeasured.cache_clear()
    return [record.message for record in caplog.records]


def test_a_gpu_where_nothing_was_measured_is_told_once(monkeypatch, caplog):
    gpu = torch.device("cuda", 0)
    (text,) = told(monkeypatch, caplog, gpu)
    assert "`lowbit tune --attention`" in text
    assert not told(monkeypatch, caplog, CPU)
    # That nothing beats torch's own was measured too.
    save(entry(64))
    assert not told(monkeypatch, caplog, gpu)
