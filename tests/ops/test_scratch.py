"""Looking ahead: what is learnt, what is prepared, and that nothing is kept alive."""

import copy
import gc
import weakref

import pytest
import torch

from lowbit.ops.scratch import Ahead, can_look_ahead


class Beside:
    """Stands for a side stream: says what was done beside, and waits for nothing."""

    def __init__(self):
        self.prepared = []
        self.joined = 0

    def begin(self):
        pass

    def run(self, prepare):
        tensors = prepare()
        self.prepared.append(tensors[0].item() - 1)
        return tensors

    def join(self, tensors):
        self.joined += 1
        return tensors


def plus_one(x, scale):
    return (x + 1,)


@pytest.fixture
def side():
    return Beside()


@pytest.fixture
def layers():
    return [torch.tensor(float(i)) for i in range(4)]


def a_pass(ahead, layers, form="fp8"):
    for layer in layers:
        (got,) = ahead.take((layer, None), form, plus_one)
        assert got == layer + 1
        ahead.begin()
        ahead.go_on()


def test_second_pass_finds_all_but_its_first_layer_prepared(side, layers):
    ahead = Ahead(side)
    a_pass(ahead, layers)
    assert side.prepared == [] and side.joined == 0
    for passes in (1, 2, 3):
        a_pass(ahead, layers)
        assert side.joined == 3 * passes
    # The first layer's weight may be another's by then.
    assert 0.0 not in side.prepared


def test_weight_written_to_between_passes_is_prepared_anew(side, layers):
    ahead = Ahead(side)
    for value in range(10, 14):
        for layer in layers:
            layer.fill_(value)
        a_pass(ahead, layers)


def test_another_order_and_another_form_are_found_out(side, layers):
    ahead = Ahead(side)
    a_pass(ahead, layers)
    a_pass(ahead, [layers[0], layers[2], layers[1], layers[3]])
    side.joined = 0
    a_pass(ahead, layers, form="int8")
    assert side.joined == 0
    a_pass(ahead, layers, form="int8")
    assert side.joined == 3


def test_two_models_in_turn(side, layers):
    ahead = Ahead(side)
    other = [torch.tensor(float(i)) for i in range(20, 23)]
    for _ in range(3):
        a_pass(ahead, layers)
        a_pass(ahead, layers)
        a_pass(ahead, other)
    assert 0.0 not in side.prepared


def test_weights_that_are_new_in_every_pass_are_never_prepared(side, layers):
    ahead = Ahead(side)
    for _ in range(3):
        a_pass(ahead, [layer.clone() for layer in layers])
    assert side.prepared == []


def test_nothing_of_a_model_is_kept_alive(side, layers):
    ahead = Ahead(side)
    for _ in range(2):
        a_pass(ahead, layers)
    (got,) = ahead.take((layers[0], None), "fp8", plus_one)
    ahead.go_on()
    prepared = weakref.ref(ahead._ready[1][0])
    gone = [weakref.ref(layer) for layer in layers]
    del got
    layers.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    assert prepared() is None and ahead._ready is None


def test_another_scale_of_the_same_weight_counts(side, layers):
    ahead = Ahead(side)
    scales = [torch.tensor(1.0) for _ in layers]

    def scaled(x, scale):
        return (x + scale,)

    def one_pass(scales):
        for layer, scale in zip(layers, scales, strict=True):
            (got,) = ahead.take((layer, scale), "fp8", scaled)
            assert got == layer + scale
            ahead.go_on()

    for _ in range(2):
        one_pass(scales)
    # The old ones are still there.
    one_pass([torch.tensor(2.0) for _ in layers])
    assert all(scale == 1 for scale in scales)


def test_a_copy_of_a_weight_is_another_layer(side, layers):
    ahead = Ahead(side)
    for _ in range(2):
        a_pass(ahead, layers)
    copies = [copy.deepcopy(layer).add_(30) for layer in layers]
    for _ in range(2):
        a_pass(ahead, copies)


def test_a_cpu_has_no_side_stream():
    assert not can_look_ahead(torch.device("cpu"))
