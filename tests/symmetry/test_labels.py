"""Labels: an equation for every pair that meets, and zeros that fit any scale."""

from fractions import Fraction

import torch

from ms_optim.symmetry.labels import ANY, FIXED_LABEL, Labels, compressed
from ms_optim.symmetry.linear_system import FIXED, LinearSystem


def equations():
    system = LinearSystem()
    labels = Labels(system)
    return system, labels, lambda label: system.solution(labels.expression(int(label)))


def test_equal_is_entry_by_entry_and_skips_zeros():
    _, labels, value = equations()
    x, y = labels.fresh(4), labels.fresh(4)
    y[1], y[2] = ANY, FIXED_LABEL
    labels.equal(x, y)
    assert value(x[0]) == value(y[0])
    assert value(x[1]) not in (FIXED, value(x[0]), value(x[3]))
    assert value(x[2]) == FIXED


def test_collapsed_makes_equal_along_axes_only():
    _, labels, value = equations()
    x = labels.fresh(2, 3)
    kept = labels.collapsed(x, [1])
    assert kept.shape == (2, 1)
    assert value(x[0, 0]) == value(x[0, 2]) == value(kept[0, 0]) != value(x[1, 0])
    zeros = torch.full((2, 3), ANY)
    assert labels.collapsed(zeros, [0, 1]).tolist() == [[ANY]]
    fixed = torch.tensor([[ANY, FIXED_LABEL]])
    assert labels.collapsed(fixed, [1]).tolist() == [[FIXED_LABEL]]


def test_sums_and_multiples_are_one_label_however_often():
    _, labels, value = equations()
    x = labels.fresh(3)
    first, again = labels.total(x, x[0]), labels.total(x[0].expand(3), x)
    assert torch.equal(first, again)
    assert value(first[1]) == value(x[0]) + value(x[1])
    assert labels.total(x, torch.tensor(FIXED_LABEL)).tolist() == x.tolist()
    assert labels.total(x, torch.tensor(ANY)).tolist() == [ANY] * 3
    halves = labels.multiple(x, Fraction(1, 2))
    assert value(halves[2]) + value(halves[2]) == value(x[2])
    assert torch.equal(halves, labels.multiple(x, Fraction(1, 2)))


def test_merged_takes_what_is_known():
    _, labels, value = equations()
    x = labels.fresh(2)
    y = torch.tensor([ANY, FIXED_LABEL])
    merged = labels.merged([y, x])
    assert value(merged[0]) == value(x[0]) and value(merged[1]) == value(x[1]) == FIXED


def test_compressed_drops_axes_on_which_nothing_varies():
    x = torch.tensor([3, 4, 5]).reshape(1, 3, 1).expand(2, 3, 7)
    assert compressed(x).shape == (1, 3, 1)
    assert torch.equal(compressed(x).expand(2, 3, 7), x)
