"""timm's registry and its training loop, with our optimizers."""

import copy
import importlib.util

import pytest
import timm.optim
import torch
from cases import convnet, everything, known_group, mlp, same, samples
from timm.optim import OptimizerRegistry, create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
import ms_optim.integrations.timm as integration
from ms_optim.errors import OptimizerError, UnsupportedError
from ms_optim.integrations.timm import OPTIMIZERS, TASKS, create_optimizer, register

NAMES = list(OPTIMIZERS)
# Those that descend along several passes' gradients: explicit passes drive them, and a loop with one backward does not.
COMBINED = [name for name in NAMES if OPTIMIZERS[name][0].combines_passes]
IN_LOOPS = [name for name in NAMES if name not in COMBINED]
OF_ONE_PASS = ["msreg", "msoptimtracesam", "msoptimrandomperturbation", "msoptimweissi"]
PENALTIES = ["msreg", "msoptimweissi"]  # added in the step
# What switches a name's own part off.
OFF = {
    "msreg": {"strength": 0.0},
    "msoptimweissi": {"strength": 0.0, "sparsity": 0.0},
    "msoptimsagm": {"rho": 0.0, "alpha": 0.0},
    "msoptimtiltedsam": {"rho": 0.0, "sigma": 0.0},
    "msoptimfrobsam": {"strength": 0.0},
    "msoptimdetsam": {"strength": 0.0},
}
OFF = {name: OFF.get(name, {"rho": 0.0}) for name in NAMES}
every_name = pytest.mark.parametrize("name", NAMES)
in_loops = pytest.mark.parametrize("name", IN_LOOPS)
# In such a loop the penalty is added after unscaling, so that nothing stands in its way but the refusal.
has_tasks = bool(TASKS) and hasattr(TASKS[0], "get_trainable_module")
with_tasks = pytest.mark.skipif(not has_tasks, reason="timm before 1.0.27 has no such tasks")


def rebalances(name):
    return name.startswith("ms") and not name.startswith("msoptim")


def small(name):
    """A network to try it on: SAM-ON needs a normaliser."""
    return convnet if name == "msoptimsamon" else mlp


def built(name, network=None, build=create_optimizer_v2, **options):
    """A network and its optimizer, by name; two groups, as timm makes them of weights and of biases."""
    torch.manual_seed(0)
    model = (network or small(name))()
    if rebalances(name):
        options = {"refresh_every": 2, "group": known_group(model), **options}
    return model, build(model, name, **{"lr": 0.05, "weight_decay": 1e-3, **options})


def unbalance(model):
    """The same function from other weights."""
    with torch.no_grad():
        model[0].weight *= 8.0
        model[0].bias *= 8.0
        model[2].weight /= 8.0


def task_of(model, criterion=None):
    from timm.task import ClassificationTask

    return ClassificationTask(model, criterion or nn.CrossEntropyLoss(), verbose=False)


def stock_loop(task, optimizer, batches, *, scaler=None, accumulate=1, clip=None):
    """What timm's script does with a task: its order of things, its in-place division, its scaler."""
    task.get_trainable_module().train()
    optimizer.zero_grad()
    losses = []
    for index, (x, y) in enumerate(batches):
        update = (index + 1) % accumulate == 0
        loss = task(x, y)["loss"]
        if accumulate > 1:
            loss /= accumulate
        parameters = None if clip is None else task.get_clip_parameters()
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=clip, parameters=parameters, need_update=update)
        else:
            loss.backward()
            if update:
                if clip is not None:
                    timm.utils.dispatch_clip_grad(parameters, clip)
                optimizer.step()
        losses.append(loss.item() * accumulate)
        if update:
            optimizer.zero_grad()
            if task.has_ema():
                task.update_ema()
    return losses


def explicit(model, optimizer, batches, clip=None):
    """The definition."""
    losses = []
    for x, y in batches:
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                loss = cross_entropy(model(x), y)
                loss.backward()
                gradient_pass.loss = loss.detach()  # which some weigh their gradients by
            if gradient_pass.first:
                losses.append(loss.item())
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


# The registry.


def test_the_names_are_in_timms_registry_and_none_was_taken():
    assert set(NAMES) <= set(list_optimizers())
    for name, (kind, _, _) in OPTIMIZERS.items():
        assert timm.optim.get_optimizer_class(name, bind_defaults=False) is kind
        assert kind.__name__ in (ms_optim.__all__)
        assert "(ms_optim)" in timm.optim.get_optimizer_info(name).description


def test_every_optimizer_of_the_package_is_registered_or_needs_what_no_command_line_can_give():
    known = {kind for kind, _, _ in OPTIMIZERS.values()}
    kinds = {getattr(ms_optim, name) for name in ms_optim.optim.catalogue.OPTIMIZERS if name in ms_optim.__all__}
    assert kinds - known == {ms_optim.BAR, ms_optim.UniversalSAM}
    for name, (kind, _, _) in OPTIMIZERS.items():
        assert name.removesuffix("adamw") in ("mssam", "msreg", f"msoptim{kind.__name__.lower()}")
        assert all(word in integration.__doc__ for word in (name, kind.__name__))


def test_no_name_has_an_underscore_and_a_stray_one_finds_nothing():
    others = set(list_optimizers()) - set(NAMES)
    for name in NAMES:
        assert "_" not in name
        ends = {name[i:] for i in range(1, len(name))}
        # An AdamW's name ends in timm's: `create_optimizer` refuses `mssam_adamw`, and timm cannot.
        assert not ends & set(NAMES) and all(end in name.partition("adamw")[1] for end in ends & others)


def test_names_scale_the_learning_rate_as_their_base_optimizer_does():
    for name, (_, defaults, _) in OPTIMIZERS.items():
        assert any(part in name for part in ("ada", "lamb")) == (defaults.get("base") is torch.optim.AdamW)


def test_registering_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(timm.optim._optim_factory._logger, "warning", pytest.fail)
    registry = OptimizerRegistry()
    for _ in range(2):
        register(registry)
        register()
    assert registry.list_optimizers() == sorted(NAMES)


def test_a_name_that_timm_has_taken_is_not_replaced():
    registry = OptimizerRegistry()
    registry.register(timm.optim.OptimInfo("msreg", torch.optim.SGD))
    with pytest.raises(OptimizerError, match=r"'msreg' already .*SGD.*ms_optim.MSRegularizedSGD"):
        register(registry)
    assert registry.list_optimizers() == ["msreg"]


def test_a_timm_that_has_moved_its_registry_is_told_apart(monkeypatch):
    monkeypatch.delattr(timm.optim._optim_factory, "default_registry")
    spec = importlib.util.spec_from_file_location("ms_optim.integrations.again", integration.__file__)
    with pytest.raises(ImportError, match="ms_optim.MSSAM"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Creation.


@every_name
@pytest.mark.parametrize("build", [create_optimizer_v2, create_optimizer])
def test_an_optimizer_is_created_by_name(name, build):
    model, optimizer = built(name, build=build, momentum=0.8, **{key: 0.3 for key in OFF[name]})
    adam = name.endswith("adamw")
    assert type(optimizer) is OPTIMIZERS[name][0]
    assert type(optimizer.base) is (torch.optim.AdamW if adam else torch.optim.SGD)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 1e-3]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.05 and all(group.get(key, 0.3) == 0.3 for key in OFF[name])
        assert adam or (group["momentum"], group["nesterov"]) == (0.8, True)
    assert optimizer.model is (model if build is create_optimizer else None)
    assert not getattr(optimizer, "is_second_order", False)
    assert copy.deepcopy(optimizer.defaults)["lr"] == 0.05 and type(optimizer).__name__ in repr(optimizer)


@every_name
def test_options_of_timm_go_where_they_belong(name):
    _, optimizer = built(name, eps=1e-3, betas=(0.8, 0.9), foreach=False, layer_decay=None)
    for group in optimizer.param_groups:
        assert group["foreach"] is False
        expected = (1e-3, (0.8, 0.9)) if name.endswith("adamw") else (None, None)
        assert (group.get("eps"), group.get("betas")) == expected
    _, optimizer = built(name, layer_decay=0.5)
    assert all("lr_scale" in group for group in optimizer.param_groups)
    key = next(iter(OFF[name]))

    def groups(model):
        return [{"params": model[0].parameters(), key: 0.7}, {"params": model[2:].parameters()}]

    _, optimizer = built(name, param_group_fn=groups, **{key: 0.2})
    assert [group[key] for group in optimizer.param_groups] == [0.7, 0.2]


@every_name
def test_options_that_nobody_knows_are_refused(name):
    for wrong in ({"rhoo": 1.0}, {"adaptive": True}, {"rebalance": "Move"}, {next(iter(OFF[name])): -1.0}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            built(name, **wrong)


@pytest.mark.parametrize("wrong", ["ms_sgd", "ms_sam", "mssam_adamw", "lookahead_mssam", "sgd"])
def test_other_names_are_refused(wrong):
    with pytest.raises(ValueError, match="mssam, mssamadamw, msreg"):
        create_optimizer(mlp(), wrong, lr=0.1)


# The training loop.


@with_tasks
@in_loops
@pytest.mark.parametrize("network", [mlp, convnet])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_stock_loop_with_a_task_makes_the_passes(name, network, clip):
    if name in PENALTIES and clip:
        pytest.skip("its penalty is added in the step, after clipping")
    if name == "msoptimsamon":
        network = small(name)
    model, optimizer = built(name, network)
    torch.manual_seed(1)
    losses = stock_loop(task_of(model), optimizer, samples(model, 5), clip=clip)
    other, its = built(name, network, create_optimizer)
    torch.manual_seed(1)
    assert losses == explicit(other, its, samples(model, 5), clip)
    assert optimizer.model is model
    assert same(everything(model, optimizer), everything(other, its))


@with_tasks
@in_loops
def test_a_loss_scale_changes_nothing(name):
    found = []
    for scaler in (None, NativeScaler("cpu")):
        model, optimizer = built(name, lambda: small(name)().float())
        batches = [(x.float(), y) for x, y in samples(model, 4)]
        stock_loop(task_of(model), optimizer, batches, scaler=scaler)
        found.append(everything(model, optimizer))
    assert same(*found)


@with_tasks
@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulation_perturbs_for_each_of_the_parts(clip):
    model, optimizer = built("msoptimsam", rho=0.3)
    parts = samples(model, 6)
    stock_loop(task_of(model), optimizer, parts, accumulate=2, clip=clip)

    other, _ = built("msoptimsam")
    plain = create_optimizer_v2(other, "sgd", lr=0.05, weight_decay=1e-3)
    parameters = list(other.parameters())
    for pair in zip(parts[::2], parts[1::2], strict=True):
        total = [torch.zeros_like(p) for p in parameters]
        for x, y in pair:
            g = torch.autograd.grad(cross_entropy(other(x), y), parameters)
            norm = sum(d.square().sum() for d in g).sqrt()
            there = {n: p.detach() + 0.3 * d / norm for (n, p), d in zip(other.named_parameters(), g, strict=True)}
            there = {n: p.requires_grad_() for n, p in there.items()}
            loss = cross_entropy(torch.func.functional_call(other, there, x), y)
            for sum_, d in zip(total, torch.autograd.grad(loss, list(there.values())), strict=True):
                sum_ += d / 2
        for p, d in zip(parameters, total, strict=True):
            p.grad = d
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        plain.step()
    for p, q in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


# Noise of one pass stays until the step.
@with_tasks
@pytest.mark.parametrize("name", [name for name in IN_LOOPS if name not in OF_ONE_PASS or name in PENALTIES])
def test_between_the_parts_of_a_step_the_weights_are_themselves(name):
    model, optimizer = built(name, convnet, refresh_every=1000)
    task = task_of(model)
    for index, (x, y) in enumerate(samples(model, 6)):
        before = list(map(torch.clone, model.parameters()))
        (task(x, y)["loss"] / 2).backward()
        if index > 0 or not rebalances(name):  # the first forward goes to the representative
            assert same(before, list(model.parameters()))
        if index % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
            assert not same(before, list(model.parameters()))
    assert optimizer.steps == 3


@with_tasks
@in_loops
def test_without_its_own_part_it_is_timms_optimizer_bit_for_bit(name):
    model, optimizer = built(name, convnet, rebalance=None, **OFF[name])
    torch.manual_seed(1)
    stock_loop(task_of(model), optimizer, samples(model, 4))
    torch.manual_seed(0)
    other = convnet()
    plain = create_optimizer_v2(other, "adamw" if name.endswith("adamw") else "sgd", lr=0.05, weight_decay=1e-3)
    torch.manual_seed(1)
    stock_loop(task_of(other), plain, samples(other, 4))
    assert same(list(model.state_dict().values()), list(other.state_dict().values()))


@with_tasks
@pytest.mark.parametrize("name", ["mssam", "msreg", "msoptimasamadamw"])
def test_a_task_may_be_given_as_well_as_found(name):
    model, optimizer = built(name)
    stock_loop(task_of(model), optimizer, samples(model, 4))
    torch.manual_seed(0)
    other = mlp()
    task = task_of(other)
    options = {"refresh_every": 2, "group": known_group(other)} if rebalances(name) else {}
    its = create_optimizer(task, name, lr=0.05, weight_decay=1e-3, **options)
    assert its.model is other
    for x, y in samples(other, 4):  # named arguments: a task that is found cannot see them in the first call
        task(input=x, target=y)["loss"].backward()
        its.step()
        its.zero_grad()
    assert same(everything(model, optimizer), everything(other, its))


@with_tasks
def test_a_task_that_is_found_in_a_call_with_keywords_says_so():
    model, optimizer = built("msoptimsam")
    task = task_of(model)
    (x, y), *_ = samples(model, 1)
    with pytest.raises(OptimizerError, match="keyword"):
        task(input=x, target=y)
    task(input=x, target=y)["loss"].backward()
    optimizer.step()


@with_tasks
@pytest.mark.parametrize("name", COMBINED)
def test_what_combines_gradients_refuses_a_loop_of_one_backward_and_takes_explicit_passes(name):
    for build in (create_optimizer, create_optimizer_v2):
        model, optimizer = built(name)
        task, ((x, y),) = task_of(model), samples(model, 1)
        before = everything(model, optimizer)
        with pytest.raises(UnsupportedError, match=f"{type(optimizer).__name__} descends along a combination"):
            if build is create_optimizer:
                build(task, name, lr=0.05)
            task(x, y)["loss"].backward()
        assert same(before, everything(model, optimizer))
    model, optimizer = built(name, build=create_optimizer)
    batches = samples(model, 1) * 20
    losses = explicit(model, optimizer, batches)
    assert losses[-1] < losses[0] and optimizer.steps == 20

    torch.manual_seed(0)
    other = small(name)()
    plain = create_optimizer_v2(other, "sgd", lr=0.05, weight_decay=1e-3)
    model, optimizer = built(name, build=create_optimizer, **OFF[name])
    for x, y in batches:
        plain.zero_grad()
        cross_entropy(other(x), y).backward()
        plain.step()
    explicit(model, optimizer, batches)
    assert same(list(model.parameters()), list(other.parameters()))


@in_loops
def test_a_loop_without_a_task_takes_one_pass_or_says_what_is_missing(name):
    def loop(model, optimizer):
        for x, y in samples(model, 4):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    if name not in OF_ONE_PASS:
        with pytest.raises(OptimizerError, match="attach"):
            loop(*built(name))
    takes_ascent = OPTIMIZERS[name][0] in (ms_optim.SAM, ms_optim.ASAM, ms_optim.MSSAM)
    ascents = ({"ascent": "momentum"}, {"ascent": "previous"}) if takes_ascent else ()
    for ascent in ({},) if name in OF_ONE_PASS else ascents:
        model, optimizer = built(name, **ascent)
        loop(model, optimizer)
        other, its = built(name, build=create_optimizer, **ascent)
        explicit(other, its, samples(other, 4))
        assert same(everything(model, optimizer), everything(other, its))


@with_tasks
@pytest.mark.parametrize("name", ["mssam", "msreg"])
@pytest.mark.parametrize("build", [create_optimizer_v2, create_optimizer])
def test_the_average_of_a_task_is_rescaled_along(name, build):
    torch.manual_seed(0)
    model = mlp()
    task = task_of(model)
    optimizer = build(task if build is create_optimizer else model, name, lr=0.05, group=known_group(model))
    task.setup_ema(decay=0.5)
    unbalance(model)
    batches = samples(model, 1)
    stock_loop(task, optimizer, batches)
    outside = ModelEmaV3(model)
    optimizer.register_rescale_hook(lambda group, t: group.rescale_(outside.module, t, clamp=True))
    unbalance(model)
    ((x, _),) = batches
    for average in (task.get_trainable_module(ema=True), outside):
        before, weights = average(x), [p.detach().clone() for p in average.parameters()]
        optimizer.refresh(x)
        torch.testing.assert_close(before, average(x), rtol=1e-10, atol=1e-12)
        assert not same(weights, list(average.parameters()))
        unbalance(model)


@with_tasks
def test_averaging_sees_no_perturbed_weights():
    model, optimizer = built("msoptimsam", convnet, rho=1.0)
    task = task_of(model)
    task.setup_ema(decay=0.0)  # the average is the last weights
    stock_loop(task, optimizer, samples(model, 3))
    average = task.get_trainable_module(ema=True).module
    assert same(list(model.state_dict().values()), list(average.state_dict().values()))


RESUMED = [(name, scaled) for name in IN_LOOPS for scaled in (False, True)]


@with_tasks
@pytest.mark.parametrize(
    ("name", "scaled"), RESUMED
)
def test_a_run_that_timm_resumes_is_the_uninterrupted_one(name, scaled, tmp_path):
    from timm.task import resume_task_checkpoint
    from timm.utils import CheckpointSaver

    def start():
        model, optimizer = built(name, lambda: convnet().float())
        task = task_of(model)
        task.setup_ema(decay=0.5)
        scheduler = CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=0.01)
        return task, optimizer, scheduler, NativeScaler("cpu") if scaled else None

    def train(task, optimizer, scheduler, scaler, epochs):
        for epoch in epochs:
            torch.manual_seed(epoch)
            batches = [(x.float(), y) for x, y in samples(task.get_trainable_module(), 2, seed=epoch)]
            stock_loop(task, optimizer, batches, scaler=scaler)
            scheduler.step(epoch + 1)

    task, optimizer, scheduler, scaler = start()
    train(task, optimizer, scheduler, scaler, range(2))
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, amp_scaler=scaler, checkpoint_dir=str(tmp_path), task=task
    )
    saver.save_checkpoint(1, metric=0.0)
    train(task, optimizer, scheduler, scaler, range(2, 4))

    again, its, its_scheduler, its_scaler = start()
    epoch = resume_task_checkpoint(again, str(tmp_path / "last.pth.tar"), its, its_scaler, log_info=False)
    its_scheduler.step(epoch)
    train(again, its, its_scheduler, its_scaler, range(epoch, 4))
    ours, theirs = (everything(t.get_trainable_module(), o) for t, o in ((task, optimizer), (again, its)))
    assert epoch == 2 and same(ours, theirs)


@with_tasks
@pytest.mark.parametrize("name", ["mssam", "mssamadamw", "msoptimsam", "msreg"])
def test_lookahead_around_ours(name):
    torch.manual_seed(0)
    model = mlp()
    options = {"refresh_every": 2, "group": known_group(model)} if rebalances(name) else {}
    optimizer = create_optimizer_v2(model, f"lookahead_{name}", lr=0.05, **options)
    stock_loop(task_of(model), optimizer, samples(model, 14))  # slow weights after 6 and 12 steps, refreshes between
    optimizer.sync_lookahead()
    ours = optimizer._base_optimizer
    if rebalances(name):
        x = samples(model, 1)[0][0]
        unbalance(model)
        for p in model.parameters():
            ours.base.state[p]["lookahead_slow_buff"].copy_(p)
        ours.refresh(x)
        for p in model.parameters():
            torch.testing.assert_close(ours.base.state[p]["lookahead_slow_buff"], p.detach(), rtol=1e-12, atol=0)


class Features(nn.Module):
    """The least that timm's tasks of distillation ask of a model."""

    pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    num_classes, in_chans, num_features, head_hidden_size = 4, 1, 8, 8

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward_features(self, x):
        return self.body(x)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.head(self.body(x))


@with_tasks
@pytest.mark.parametrize("kind", ["LogitDistillationTask", "FeatureDistillationTask"])
def test_tasks_of_distillation_make_the_passes(kind):
    torch.manual_seed(0)
    student, teacher = Features(), Features().eval()
    before = copy.deepcopy(teacher.state_dict())
    task = getattr(timm.task, kind)(student, teacher, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), "msoptimsam", lr=0.05, rho=0.3)
    twin = copy.deepcopy(task)
    batches = samples(convnet(), 3)
    stock_loop(task, optimizer, batches)
    assert optimizer.model is task.get_trainable_module()
    its = ms_optim.SAM(twin.get_trainable_module(), lr=0.05, momentum=0.9, nesterov=True, rho=0.3)
    for x, y in batches:
        for gradient_pass in its.passes():
            with gradient_pass:
                twin(x, y)["loss"].backward()
        its.step()
    assert same(list(task.state_dict().values()), list(twin.state_dict().values()))
    assert same(list(before.values()), list(teacher.state_dict().values()))


@with_tasks
@pytest.mark.slow
def test_a_network_of_timm_is_trained_from_the_command_lines_words():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).float()
    optimizer = create_optimizer_v2(model, "mssam", lr=0.05, weight_decay=1e-4, rho=0.1, refresh_every=2)
    batches = [(torch.randn(8, 3, 32, 32).float(), torch.randint(0, 4, (8,)))] * 6
    losses = stock_loop(task_of(model), optimizer, batches)
    assert losses[-1] < losses[0] and optimizer.balance is not None and len(optimizer.group) > 3
