import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint, CheckpointError
from lowbit.quant.convert import plan, stream
from lowbit.quant.quantize_file import quantize_file
from tests.checkpoints import write_wan

FORMAT = "fp8_e4m3"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors", layers=1)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.mark.parametrize("name", formats.names())
def test_file_holds_what_is_streamed_and_safetensors_reads_it(wan, target, name):
    result = quantize_file(wan, target, name, keep=["attn"])
    work = plan(Checkpoint(wan), name, keep=["attn"])
    want = dict(stream(work))
    got = load_file(target)
    assert got.keys() == want.keys()
    for tensor in want:
        a, b = got[tensor], want[tensor]
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    with safe_open(str(target), "pt") as file:
        assert file.metadata() == work.metadata()
    assert result.path == str(target)
    assert [r.name for r in result.records] == [r.name for r in work.records]
    assert result.result_bytes == Checkpoint(target).size_bytes
    assert result.source_bytes == Checkpoint(wan).size_bytes
    assert result.result_bytes < result.source_bytes
    assert result.seconds > 0


def test_progress_ends_at_the_total_and_never_goes_back(wan, target):
    calls = []
    quantize_file(wan, target, FORMAT, progress=lambda done, total: calls.append((done, total)))
    (total,) = {total for _, total in calls}
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == total == Checkpoint(wan).size_bytes


@pytest.mark.parametrize("existing", [None, b"as it was"])
@pytest.mark.parametrize("error", [InterruptedError, KeyboardInterrupt])
def test_progress_that_raises_stops_and_leaves_no_file(wan, target, existing, error):
    if existing:
        target.write_bytes(existing)

    def stop(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(error):
        quantize_file(wan, target, FORMAT, overwrite=True, progress=stop)
    assert [p.read_bytes() for p in target.parent.iterdir()] == ([existing] if existing else [])


def test_nan_names_file_and_layer_and_leaves_no_file(wan, tmp_path):
    tensors = load_file(wan)
    tensors["blocks.0.ffn.2.weight"][0, 0] = torch.nan
    source = tmp_path / "nan.safetensors"
    save_file(tensors, source)
    with pytest.raises(formats.NotFiniteError, match=r"nan.safetensors: layer blocks.0.ffn.2"):
        quantize_file(source, tmp_path / "out.safetensors", FORMAT)
    assert list(tmp_path.iterdir()) == [source]


def test_existing_target_is_replaced_only_when_asked(wan, target):
    target.write_bytes(b"as it was")
    with pytest.raises(CheckpointError, match=r"out.safetensors: it exists; pass --overwrite"):
        quantize_file(wan, target, FORMAT)
    assert target.read_bytes() == b"as it was"
    quantize_file(wan, target, FORMAT, overwrite=True)
    assert len(Checkpoint(target)) > 1


@pytest.fixture
def copy(wan, tmp_path):
    path = tmp_path / "in.safetensors"
    path.write_bytes(wan.read_bytes())
    return path


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_source_is_never_the_target(copy, tmp_path, link):
    target = copy
    if link:
        target = tmp_path / "link.safetensors"
        link(copy, target)
    before = copy.read_bytes()
    with pytest.raises(CheckpointError, match="source and target are the same file"):
        quantize_file(copy, target, FORMAT, overwrite=True)
    assert copy.read_bytes() == before


def test_shard_of_the_source_is_never_the_target(copy, tmp_path):
    names = {name: copy.name for name in Checkpoint(copy)}
    (tmp_path / "in.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="source and target are the same file"):
        quantize_file(tmp_path, copy, FORMAT, overwrite=True)


def test_target_must_be_a_safetensors_file(wan, tmp_path):
    with pytest.raises(CheckpointError, match=r"must end with .safetensors"):
        quantize_file(wan, tmp_path / "out.ckpt", FORMAT)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="it is a folder"):
        quantize_file(wan, tmp_path / "folder.safetensors", FORMAT, overwrite=True)
    with pytest.raises(CheckpointError, match="there is no folder"):
        quantize_file(wan, tmp_path / "none" / "out.safetensors", FORMAT)


def test_missing_source_is_named(tmp_path, target):
    with pytest.raises(CheckpointError, match=r"none.safetensors: No such file"):
        quantize_file(tmp_path / "none.safetensors", target, FORMAT)


@pytest.mark.parametrize(
    "options", [{"recipe_name": "flux"}, {"keep": ["("]}, {"keep": ["."]}], ids=str
)
def test_bad_options_leave_no_file(wan, target, options):
    with pytest.raises(ValueError, match=r"unknown recipe|no regular expression|nothing to quan"):
        quantize_file(wan, target, FORMAT, **options)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    "pattern",
    ["attn|" + r"\\" * 2000, "attn|" + "漢" * 3000, "attn|" + '"' * 3000],
    ids=["backslashes", "not ASCII", "quotes"],
)
def test_header_has_room_for_reasons_that_json_lengthens(wan, target, pattern):
    """A reason is escaped twice: as JSON within JSON."""
    quantize_file(wan, target, FORMAT, keep=[pattern])
    kept = json.loads(Checkpoint(target).metadata["_lowbit"])["kept"]
    assert kept["blocks.0.self_attn.q"] == f"kept as asked: {pattern}"


def test_header_has_room_for_the_source_s_metadata(wan, tmp_path, target):
    source = tmp_path / "in.safetensors"
    metadata = {"workflow": json.dumps({"text": '"漢字\\' * 2000}), "format": "pt"}
    save_file(load_file(wan), source, metadata)
    quantize_file(source, target, FORMAT)
    got = Checkpoint(target).metadata
    assert {key: got[key] for key in metadata} == metadata


def test_result_can_be_quantized_again(wan, target, tmp_path):
    quantize_file(wan, target, FORMAT)
    again = tmp_path / "again.safetensors"
    result = quantize_file(target, again, FORMAT)
    assert {r.reason for r in result.records if r.format} == {"as stored"}
    a, b = load_file(target), load_file(again)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a if a[n].dim())


def test_large_tensors_of_the_result_are_aligned(wan, target):
    quantize_file(wan, target, FORMAT)
    for info in Checkpoint(target).values():
        assert info.start % info.dtype.itemsize == 0
