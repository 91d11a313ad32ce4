"""The attention node's inputs, which workflows hold: names, order and options never change."""

import pytest

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
        "kitchen_int8",
        "sageattn",
    ],
    "layers": ["self", "cross", "all"],
    "blocks": "STRING",
    "start_percent": "FLOAT",
    "end_percent": "FLOAT",
    "guard": "BOOLEAN",
}


def test_inputs_are_those_that_workflows_hold():
    required = LowBitAttention.INPUT_TYPES()["required"]
    assert {name: kind for name, (kind, _) in required.items()} == INPUTS
    assert list(required) == list(INPUTS)


@pytest.mark.parametrize("mode", MODES)
def test_router_knows_every_mode(mode):
    assert mode in router.NAMES
