"""Which products are tuned."""

import pytest

from lowbit.ops import tuning
from lowbit.quant import families
from lowbit.quant.checkpoint import CheckpointError
from lowbit.quant.quantize_file import quantize_file
from lowbit.quant.tune import Problem, problems
from tests.checkpoints import write_wan

WEIGHTS = {(256, 256), (512, 256), (256, 512)}


def test_layers_of_every_family_are_there_with_their_tokens():
    found = problems.of_families()
    for name in families.names():
        for layer in (x for shapes in families.get(name).shapes.values() for x in shapes):
            for m in (*layer.tokens, *problems.FEW_ROWS):
                assert any(
                    (p.n, p.k) == (layer.N, layer.K) and tuning.bucket(p.m) == tuning.bucket(m)
                    for p in found
                )


def test_layers_with_many_tokens_come_first():
    sizes = [p.m > max(problems.FEW_ROWS) for p in problems.of_families()]
    assert sizes == sorted(sizes, reverse=True)


def test_rows_can_be_named():
    assert {p.m for p in problems.of_families([3, 5000])} == {3, 5000}


def test_each_bucket_is_measured_once():
    found = problems.distinct([Problem(500, 64, 64), Problem(512, 64, 64), Problem(513, 64, 64)])
    assert found == [Problem(500, 64, 64), Problem(513, 64, 64)]
    everything = problems.of_families()
    assert len({(tuning.bucket(p.m), p.n, p.k) for p in everything}) == len(everything)


def test_layers_of_a_checkpoint_are_those_that_are_quantized(tmp_path):
    found = problems.of_checkpoint(write_wan(tmp_path / "wan.safetensors"))
    # Embeddings, the head and the like are not.
    assert {(p.n, p.k) for p in found} == WEIGHTS
    assert {p.m for p in found} == {*problems.FEW_ROWS, *problems.UNKNOWN_TOKENS}
    assert found[0].n * found[0].k == 512 * 256


def test_packed_weights_of_a_checkpoint_count_by_their_real_width(tmp_path):
    source, target = tmp_path / "wan.safetensors", tmp_path / "packed.safetensors"
    quantize_file(write_wan(source), target, "convrot_w4a4")
    assert {(p.n, p.k) for p in problems.of_checkpoint(target, [7])} == WEIGHTS


def test_real_models_are_measured_with_their_real_tokens(tmp_path):
    path = write_wan(tmp_path / "wan.safetensors", dim=1536, ffn=8960, layers=1)
    many = {p.m for p in problems.of_checkpoint(path) if p.m > max(problems.FEW_ROWS)}
    assert many == {m for layer in families.get("wan").shapes["1.3B"] for m in layer.tokens}


def test_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        problems.of_checkpoint(tmp_path / "none.safetensors")


def test_shape_is_read():
    assert problems.named("512,3072,1024") == Problem(512, 3072, 1024)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("512,3072", "three whole numbers M,N,K"),
        ("512x3072x3072", "three whole numbers"),
        ("512,3072,3072,1", "three whole numbers"),
        ("0,64,64", "above zero"),
        ("1,-5,64", "above zero"),
        ("1,64,100", "K a multiple of 16"),
        ("200000,64,64", "M=200000: 1 to 131072 rows"),
    ],
)
def test_shape_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        problems.named(text)
