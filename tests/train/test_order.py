"""The order of images, and the seeds of all that is drawn."""

import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from ms_optim.errors import DataError
from ms_optim.train.order import (
    EvaluationOrder,
    Purpose,
    Ranks,
    TrainingOrder,
    entropy,
    integer,
    seed_everything,
    streams,
)

sizes = st.integers(1, 60)


def drawn():
    return random.random(), float(np.random.random()), float(torch.rand(()))


@hypothesis.given(samples=st.integers(8, 60), batch=st.integers(1, 4), world=st.integers(1, 2), epoch=st.integers(0, 3))
def test_the_ranks_batches_together_are_the_batch_of_one_process(samples, batch, world, epoch):
    joint = TrainingOrder(samples, batch * world, 7, Ranks())
    parts = [TrainingOrder(samples, batch, 7, Ranks(rank, world)) for rank in range(world)]
    for order in (joint, *parts):
        order.set_epoch(epoch)
    assert {len(part) for part in parts} == {len(joint)}
    for one, *many in zip(joint, *parts, strict=True):
        assert sorted(one.indices) == sorted(index for each in many for index in each.indices)
        assert {each.number for each in many} == {one.number}


@hypothesis.given(samples=sizes, batch=sizes)
def test_an_epoch_takes_no_image_twice_and_whole_batches_only(samples, batch):
    hypothesis.assume(samples >= batch)
    order = TrainingOrder(samples, batch, 0, Ranks())
    batches = [each.indices for each in order]
    assert [len(each) for each in batches] == [batch] * (samples // batch)
    taken = [index for each in batches for index in each]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(samples))


def test_the_order_follows_from_seed_and_epoch_alone():
    def order(seed, epoch):
        found = TrainingOrder(40, 10, seed, Ranks())
        found.set_epoch(epoch)
        return found.indices().tolist()

    found = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert found == [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(each) for each in found}) == 4


@pytest.mark.parametrize("world", [1, 2])
def test_a_training_set_of_less_than_a_batch_is_refused(world):
    with pytest.raises(DataError, match=r"7 training images are less than one batch of 8.*--batch-size"):
        TrainingOrder(7, 8, 0, Ranks(0, world))


def test_repeated_augmentation_repeats_images_and_follows_the_seed():
    def order(seed, epoch, rank=0):
        found = TrainingOrder(600, 16, seed, Ranks(rank, 2), repeats=3)
        found.set_epoch(epoch)
        assert len(list(found)) == len(found)
        return found.indices().tolist()

    first, second = order(0, 0), order(0, 0, rank=1)
    assert len(set(first)) < len(first) + len(second)
    assert max(np.bincount(first + second)) == 3
    assert first == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@hypothesis.given(samples=sizes, batch=st.integers(1, 9), world=st.integers(1, 5))
def test_evaluation_sees_every_image_once_and_ranks_have_equally_many_batches(samples, batch, world):
    orders = [EvaluationOrder(samples, batch, Ranks(rank, world)) for rank in range(world)]
    assert len({len(order) for order in orders}) == 1
    seen = []
    for order in orders:
        batches = [each.indices for each in order]
        assert len(batches) == len(order)
        mine = [index for each in batches for index in each]
        assert len(mine) - order.real in (0, 1)
        seen += mine[: order.real]
    assert sorted(seen) == list(range(samples))


def test_different_tuples_have_different_streams():
    # The third and fourth are what numpy's sequence alone takes for the same.
    keys = [(0,), (0, 0), (1,), (1, 0), (0, 1), (2**32,), (0, 1, 0), (1, 2), (2, 1), (-1,), (2**64 - 2,)]
    keys = [(purpose, *key) for purpose in (Purpose.ORDER, Purpose.HOST) for key in keys]
    assert len({integer(*key) for key in keys}) == len(keys)
    assert len({tuple(entropy(*key).generate_state(4)) for key in keys}) == len(keys)


def test_seeding_everything_is_repeatable_and_differs_by_seed_epoch_and_rank():
    found = []
    for _ in range(2):
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            seed_everything(*key)
            found.append(drawn())
    assert found[:4] == found[4:]
    assert len(set(found[:4])) == 4


def test_streams_are_seeded_inside_and_go_on_outside_as_if_nothing_had_been():
    seed_everything(3, 0, 0)
    expected = [drawn(), drawn()]
    seed_everything(3, 0, 0)
    outside = [drawn()]
    with streams(Purpose.HOST, 1, 2):
        inside = drawn()
    outside.append(drawn())
    assert outside == expected
    with streams(Purpose.HOST, 1, 2):
        assert drawn() == inside
    with pytest.raises(KeyError), streams(Purpose.HOST, 1, 3):
        assert drawn() != inside
        raise KeyError
    after = drawn()
    seed_everything(3, 0, 0)
    assert [drawn(), drawn(), drawn()] == [*expected, after]
