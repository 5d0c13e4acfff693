"""Training on a GPU: what it does differently there (never run without one)."""

import pytest
import torch
from train.runs import SMALL, last

from ms_optim.train import run

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = {**SMALL, "device": "cuda", "threads": None, "model": "ms_optim.models:small_resnet", "crop_padding": 1}


@pytest.mark.parametrize("opt", ["sgd", "msoptimsam", "mssam", "msreg"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"amp": True, "amp_dtype": "bfloat16", "channels_last": True},
        {"amp": True, "amp_dtype": "float16", "channels_last": True, "clip_grad": 1.0, "grad_accum_steps": 2},
        {"torchcompile": "inductor", "amp": True, "amp_dtype": "bfloat16"},
    ],
    ids=["float32", "bfloat16", "float16", "compiled"],
)
def test_digits_are_learnt(tmp_path, opt, how):
    outcome = run({**GPU, **how, "opt": opt, "epochs": 8, "output": str(tmp_path)})
    assert outcome["test_top1"] > 80


@pytest.mark.parametrize("opt", ["sgd", "mssam"])
def test_a_deterministic_run_resumes_with_the_same_bits(tmp_path, opt):
    settings = {**GPU, "opt": opt, "deterministic": True, "sched": "none", "output": str(tmp_path), "model_ema": True}
    run({**settings, "experiment": "whole"})
    run({**settings, "experiment": "parts", "epochs": 1})
    run({**settings, "experiment": "parts", "resume": "auto"})
    for key in ("state_dict", "state_dict_ema"):
        one, other = last(tmp_path / "whole")[key], last(tmp_path / "parts")[key]
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_workers_and_memory_train_alike_without_augmentation(tmp_path):
    losses = []
    for name, how in (("memory", {"in_memory": "yes"}), ("workers", {"in_memory": "no", "workers": 2})):
        own = {**GPU, "crop_padding": 0, "deterministic": True, "epochs": 2}
        losses.append(run({**own, **how, "output": str(tmp_path), "experiment": name})["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
