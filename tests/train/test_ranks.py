"""Two processes started by torchrun train as one does, with DistributedDataParallel and with sharded weights."""

import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from distributed.torchrun import on_two_ranks
from train.runs import SMALL, command, differences, environment, last, of_training, summary

from ms_optim.train import checkpoint, order, run, training

#: float32 sums of 64 gradients in another order: 16 steps make differences of this size in weights of size 0.1.
TOLERANCE = 2e-5

CASES = {
    "SGD": {"opt": "sgd"},
    "SAM": {"opt": "msoptimsam", "opt_kwargs": {"rho": 0.1}},
    "ASAM": {"opt": "msoptimasam", "opt_kwargs": {"rho": 0.5}},
    # Exact columns: with sampled ones each rank draws signs of its own, which one process cannot.
    "MSSAM": {"opt": "mssam", "opt_kwargs": {"rho": 0.1, "refresh_every": 5, "columns": None}},
    "MSSAM, accumulation, average, clipping": {
        **{"opt": "mssam", "opt_kwargs": {"rho": 0.1, "columns": None}, "clip_grad": 0.5},
        **{"grad_accum_steps": 2, "model_ema": True, "model_ema_decay": 0.9},
    },
}


def train_on_two_ranks(settings):
    """Train on two ranks; what they printed."""
    return on_two_ranks(*command(settings)[1:])


def joint(settings, folder, world):
    """The settings of one of ``world`` processes: they share a batch of 64."""
    own = {**SMALL, **settings, "epochs": 2, "lr": 0.05, "output": str(folder.parent), "experiment": folder.name}
    return {**own, "batch_size": 64 // world // own.get("grad_accum_steps", 1)}


def compare_weights(one, other, tolerance=TOLERANCE):
    for key in ("state_dict", "state_dict_ema"):
        for name, tensor in one.get(key, {}).items():
            torch.testing.assert_close(other[key][name], tensor, rtol=0, atol=tolerance, msg=f"{key}.{name}")


def slow(names, fast):
    """All but some marked slow: each starts processes."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow(CASES, ("MSSAM",)))
def test_two_processes_are_one_with_the_joint_batch(tmp_path, name):
    run(joint(CASES[name], tmp_path / "one", 1))
    train_on_two_ranks(joint(CASES[name], tmp_path / "two", 2))
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    compare_weights(one, two)
    start = torch.cat([t.flatten() for t in one["state_dict"].values()])
    assert start.abs().max() > 100 * TOLERANCE  # the tolerance is not of the weights' size
    for a, b in zip(summary(tmp_path / "one"), summary(tmp_path / "two"), strict=True):
        for key in ("train_loss", "eval_loss", "eval_top1", "eval_top5"):
            assert float(a[key]) == pytest.approx(float(b[key]), abs=1e-4 if "loss" in key else 1.0), key


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 cannot shard on a CPU")
@pytest.mark.parametrize("name", slow(("SGD", "MSSAM"), ()))
def test_sharded_weights_train_as_whole_ones_and_leave_a_plain_checkpoint(tmp_path, name):
    run(joint(CASES[name], tmp_path / "one", 1))
    own = {**CASES[name], "fsdp": True, "sharpness_interval": 1, "sharpness_samples": 20}
    settings = joint(own, tmp_path / "two", 2)
    train_on_two_ranks({**settings, "epochs": 1, "sched": "none"})
    train_on_two_ranks({**settings, "experiment": "whole", "sched": "none"})
    train_on_two_ranks({**settings, "sched": "none", "resume": "auto"})
    compare_weights(last(tmp_path / "whole"), last(tmp_path / "two"), 0)
    run(joint({**CASES[name], "sched": "none"}, tmp_path / "plain", 1))
    compare_weights(last(tmp_path / "plain"), last(tmp_path / "two"))
    # A process alone goes on from what the sharded run left.
    more = {**joint(CASES[name], tmp_path / "two", 1), "epochs": 3, "sched": "none", "resume": "auto"}
    run(more)
    assert last(tmp_path / "two")["epoch"] == 2


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_with_the_same_bits(tmp_path):
    settings = {
        **{"model": "ms_optim.models:small_resnet", "opt": "mssam", "opt_kwargs": {"rho": 0.1, "refresh_every": 3}},
        **{"train_num_samples": 256, "crop_padding": 1, "sched": "none"},
    }
    train_on_two_ranks(joint(settings, tmp_path / "whole", 2))
    train_on_two_ranks({**joint(settings, tmp_path / "parts", 2), "epochs": 1})
    train_on_two_ranks({**joint(settings, tmp_path / "parts", 2), "resume": "auto"})
    assert differences(of_training(last(tmp_path / "whole")), of_training(last(tmp_path / "parts"))) == []
    best = [checkpoint.read(tmp_path / name / "model_best.pth.tar") for name in ("whole", "parts")]
    assert differences(of_training(best[0]), of_training(best[1])) == []


def test_sharding_alone_is_refused(tmp_path):
    words = command({**SMALL, "fsdp": True, "output": str(tmp_path)})
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--fsdp shards weights over several processes" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("force_cpu", [False, True])
def test_an_average_on_the_cpu_is_left_out_where_ranks_share_statistics(monkeypatch, force_cpu):
    # NCCL knows no CPU: sharing would end a run of several GPUs after its first epoch.
    shared = []
    monkeypatch.setattr("timm.utils.distribute_bn", lambda model, world, reduce: shared.append((model, world, reduce)))
    options = SimpleNamespace(dist_bn="reduce", sync_bn=False, model_ema_force_cpu=force_cpu)
    here, average = SimpleNamespace(distributed=True, world=2), SimpleNamespace(module="average")
    run = SimpleNamespace(options=options, here=here, model="model", average=average)
    training.Training._same_statistics(run)
    assert shared == [("model", 2, True), *([] if force_cpu else [("average", 2, True)])]


@pytest.mark.slow
@pytest.mark.parametrize("m", ["local", pytest.param(32, marks=pytest.mark.slow)])
def test_each_rank_has_a_perturbation_of_its_own_where_m_says_so(tmp_path, monkeypatch, m):
    case = {"opt": "msoptimsam", "opt_kwargs": {"rho": 0.5}}

    def one(name, m):
        run(joint({**case, "opt_kwargs": {"rho": 0.5, "m": m}}, tmp_path / name, 1))
        return last(tmp_path / name)

    train_on_two_ranks(joint({**case, "opt_kwargs": {"rho": 0.5, "m": m}}, tmp_path / "two", 2))
    # One process whose batches of 64 hold the first rank's images first.
    indices = order.TrainingOrder.indices

    def by_rank(self):
        return torch.cat([torch.cat([batch[0::2], batch[1::2]]) for batch in indices(self).split(64)])

    monkeypatch.setattr(order.TrainingOrder, "indices", by_rank)
    compare_weights(one("one", 32), last(tmp_path / "two"))
    with pytest.raises(AssertionError):  # and that is not the joint perturbation
        compare_weights(one("joint", "global"), last(tmp_path / "two"))
