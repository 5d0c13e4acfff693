"""The examples of distributed training run under torchrun and learn."""

import re

import pytest
import torch
from distributed.torchrun import ROOT, on_two_ranks
from torch import distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.mark.slow
@pytest.mark.parametrize(
    "example",
    [
        "with_ddp.py",
        pytest.param(
            "with_fsdp2.py",
            marks=pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="GPUs only in torch 2.6"),
        ),
    ],
)
def test_an_example_learns_the_digits(example):
    printed = on_two_ranks(ROOT / "examples" / example)
    accuracy = re.search(r"test accuracy ([\d.]+) %", printed)
    assert accuracy and float(accuracy[1]) > 88
