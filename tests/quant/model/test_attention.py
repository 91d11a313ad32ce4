"""The router behind diffusers' attention: which calls it takes, how exact, and undoing it."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import lowbit
from lowbit.ops.attention import router
from lowbit.ops.attention.modes import MODES
from lowbit.ops.registry import NoBackendError
from lowbit.quant.model import attention

# Relative error at most: ours on normally distributed data, FP4's a tenth above what its tests
# find there, torch's own by the order of its sums.
LIMITS = {f"lowbit_{name}": mode.max_error for name, mode in MODES.items()} | {"lowbit_fp4": 0.21}
SUMS = 8 * torch.finfo(torch.float32).eps
ON_CPU = [name for name in router.NAMES if router.missing(name, torch.device("cpu")) is None]


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture
def calls(monkeypatch):
    """Record (mode, queries, keys, mask) of what goes through the router."""
    seen, route = [], router.route

    def watched(q, k, v, mode, *, mask=None, **options):
        seen.append((mode, q.shape[2], k.shape[2], mask))
        return route(q, k, v, mode, mask=mask, **options)

    monkeypatch.setattr(router, "route", watched)
    return seen


@pytest.mark.parametrize("mode", ON_CPU)
def test_every_mode_computes_the_same_within_its_error(model, run, mode):
    want = run(model)
    with lowbit.set_attention(model, mode, layers="all"):
        got = run(model)
    assert error(got, want) <= LIMITS.get(mode, SUMS)
    assert torch.equal(run(model), want)


def test_layers_and_blocks_are_those_that_are_asked_for(small, model, run, calls):
    depth = small.config["num_layers"]
    cases = {
        ("self", ""): depth,
        ("self", "1-"): depth - 1,
        ("all", "0"): 2 if small.name == "wan" else 1,
    }
    if small.name == "wan":
        cases |= {("cross", ""): depth, ("cross", "0, 2-3"): 1}
    for (layers, blocks), count in cases.items():
        calls.clear()
        with lowbit.set_attention(model, "lowbit_exact", layers=layers, blocks=blocks) as done:
            run(model)
        assert len(calls) == len(done.names) == count, (layers, blocks)
        if small.name == "wan" and layers != "all":
            assert all((q == k) == (layers == "self") for _, q, k, _ in calls)


def test_masks_reach_the_router(small, model, calls):
    if small.name != "qwen_image":
        pytest.skip("Wan has no masks")
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(small.latent_shape, generator=generator)
    text = torch.randn(len(latent), 16, 256, generator=generator)
    mask = torch.ones(len(latent), 16, dtype=torch.bool)
    mask[1, 5:] = False

    def run():
        with torch.inference_mode():
            return model(
                latent,
                timestep=torch.full((len(latent),), 0.5),
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, 8, 8)]] * len(latent),
                return_dict=False,
            )[0]

    want = run()
    lowbit.set_attention(model, "lowbit_exact")
    assert error(run(), want) <= MODES["exact"].max_error
    assert all(m.dtype == torch.bool and m.shape[-1] == 80 for *_, m in calls)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_masks_of_any_number_of_dimensions_are_understood(dims):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 32) for n in (7, 9, 9))
    mask = torch.rand(2, 9) > 0.4
    full = mask[:, None, None].expand(2, 1, 7, 9)
    given = {2: mask, 3: full[:, 0], 4: full}[dims]
    got = attention._function("sdpa", False, None)(q, k, v, attn_mask=given)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want = scaled_dot_product_attention(*heads_first, attn_mask=full).transpose(1, 2)
    assert torch.equal(got, want)


def test_what_a_mode_does_not_take_goes_to_the_backend_before(model, run, calls, caplog):
    want = run(model)
    lowbit.set_attention(model, "lowbit_exact")
    attention._said.clear()
    assert error(run(model.double(), torch.float64).float(), want) <= 1e-5
    assert not calls
    assert "left to diffusers' own backend: lowbit_exact" in caplog.text


def test_backend_that_the_user_chose_before_takes_the_rest(model, run, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    used, name = [], dispatch.AttentionBackendName._NATIVE_MATH
    native = dispatch._AttentionBackendRegistry._backends[name]

    def watched(**options):
        used.append(options)
        return native(**options)

    monkeypatch.setitem(dispatch._AttentionBackendRegistry._backends, name, watched)
    model.set_attention_backend(name.value)
    want = run(model)
    before = len(used)
    lowbit.set_attention(model, "auto", layers="all")
    assert torch.equal(run(model), want)
    assert len(used) == 2 * before > 0


def test_diffusers_own_list_of_backends_stays_as_it_is(model):
    from diffusers.models.attention_dispatch import AttentionBackendName

    before = list(AttentionBackendName)
    lowbit.set_attention(model, "lowbit_exact")
    assert list(AttentionBackendName) == before


def test_settings_nest_and_undo_in_order(model, run):
    want = run(model)
    first = lowbit.set_attention(model, "lowbit_exact")
    exact = run(model)
    second = lowbit.set_attention(model, "sdpa")
    with pytest.raises(RuntimeError, match="its processor was replaced again"):
        first.undo()
    second.undo()
    assert torch.equal(run(model), exact)
    first.undo()
    first.undo()
    assert torch.equal(run(model), want)


def test_copy_of_a_model_keeps_its_attention(model, run, calls):
    done = lowbit.set_attention(model, "lowbit_exact")
    want, twin = run(model), copy.deepcopy(model)
    done.undo()
    calls.clear()
    assert torch.equal(run(twin), want)
    assert calls


def test_rotation_is_of_the_models_that_asked_for_it(model, run, monkeypatch):
    given, route = [], router.route

    def watched(*call, **options):
        given.append(options["rotate"])
        return route(*call, **options)

    monkeypatch.setattr(router, "route", watched)
    for rotate in (False, True, False):
        given.clear()
        with lowbit.set_attention(model, "lowbit_exact", rotate=rotate):
            run(model)
        assert given and all(was == rotate for was in given)


def test_wrong_words_are_refused(model):
    for options, match in (
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"layers": "both"}, "unknown layers 'both'"),
        ({"blocks": "3-1"}, "ends before it starts"),
        ({"blocks": "77"}, "no attention of layers 'all' and blocks '77'"),
        ({"mode": "sdpa", "rotate": True}, "sdpa cannot rotate q and k"),
    ):
        with pytest.raises(ValueError, match=match):
            lowbit.set_attention(model, **options)
    with pytest.raises(NoBackendError, match="cudnn"):
        lowbit.set_attention(model, "cudnn")


def test_model_without_such_attention_is_refused():
    with pytest.raises(ValueError, match=r"no attention processors .* 0\.37"):
        lowbit.set_attention(torch.nn.Sequential(torch.nn.Linear(4, 4)), "sdpa")


def test_gpu_that_a_model_runs_on_is_known_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for available, of_cpu in ((True, torch.device("cuda", 3)), (False, torch.device("cpu"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert attention.running_device("cpu") == of_cpu
    assert attention.running_device("cuda") == torch.device("cuda", 3)
    assert attention.running_device("cuda:1") == torch.device("cuda", 1)
