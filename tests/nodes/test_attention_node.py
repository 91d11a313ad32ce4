"""The attention node's inputs, which workflows hold: names, order and options never change."""

import pytest

from lowbit.nodes import host
from lowbit.nodes.attention import MODES, LowBitAttention
from lowbit.ops.attention import router

INPUTS = {
    "model": "MODEL",
    "mode": [
        "auto",
        "lowbit_exact",
        "lowbit_int8",
        "lowbit_fp8",
        "sdpa",
        "cudnn",
        "flash",
        "kitchen_int8",
        "sageattn",
        "sageattn3_fp4",
        "lowbit_fp4",
    ],
    "layers": ["self", "cross", "image_cross", "all"],
    "blocks": "STRING",
    "start_percent": "FLOAT",
    "end_percent": "FLOAT",
    "guard": ["off", "first_call", "every_call"],
}


# What came later: workflows from before have no value for it, and the node has its default.
LATER = {"rotation": ["none", "hadamard"]}


def test_inputs_are_those_that_workflows_hold():
    given = LowBitAttention.INPUT_TYPES()
    for kind, wanted in (("required", INPUTS), ("optional", LATER)):
        assert {name: kind for name, (kind, _) in given[kind].items()} == wanted
        assert list(given[kind]) == list(wanted)


def test_defaults_are_those_of_the_best_choice():
    given = LowBitAttention.INPUT_TYPES()
    defaults = {
        name: settings["default"]
        for name, (_, settings) in (given["required"] | given["optional"]).items()
        if "default" in settings
    }
    assert defaults == {
        "mode": "auto",
        "layers": "all",
        "blocks": "",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "guard": "first_call",
        "rotation": "none",
    }


def test_values_of_older_workflows_set_the_override_that_they_set_before(monkeypatch):
    made = []
    monkeypatch.setattr(host, "set_attention", lambda model, override: made.append(override))
    given = (None, "lowbit_exact", "all", "", 0.0, 1.0, "off")
    LowBitAttention().set_attention(*given)
    LowBitAttention().set_attention(*given, rotation="hadamard")
    assert [override.rotate for override in made] == [False, True]


def test_every_way_of_the_router_can_be_chosen():
    assert set(MODES) == set(router.NAMES)


@pytest.mark.parametrize("mode", [*MODES, *router.ALIASES, None])
def test_names_of_older_wrappers_are_valid(mode):
    assert LowBitAttention.VALIDATE_INPUTS(mode) is True


@pytest.mark.parametrize(("mode", "text"), [("fast", "unknown mode"), ("flash_attn_3", "cudnn")])
def test_other_names_are_refused_with_what_is_wrong(mode, text):
    assert text in LowBitAttention.VALIDATE_INPUTS(mode)
