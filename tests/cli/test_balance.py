"""``ms-optim balance``: the same function, the same layout, a smaller trace; or nothing at all."""

import json

import pytest
import torch
from cli import project
from cli.conftest import QUICK

import ms_optim

NAMED = ("--model", "cli.project:network", "--data", "cli.project:batches", "--dtype", "float64")


def unbalanced():
    """The network's weights at an equivalent, badly scaled place."""
    model = project.network()
    group = ms_optim.scale_symmetries(model, project.inputs())
    group.rescale_(model, [2.0])
    return model


def logits(state):
    model = project.network()
    model.load_state_dict(state)
    return model(project.inputs())


@pytest.fixture
def plain(tmp_path):
    torch.save(unbalanced().state_dict(), tmp_path / "in.pth")
    return tmp_path / "in.pth"


def test_the_weights_are_those_of_rebalance_and_the_function_is_the_same(ms, plain):
    out = plain.with_name("out.pth")
    run = ms("balance", plain, out, *NAMED)
    assert (run.code, run.err) == (0, "")
    model = unbalanced()
    found = ms_optim.rebalance_(model, project.batches())
    written = torch.load(out, weights_only=True)
    assert list(written) == list(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(written[name], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits(written), logits(torch.load(plain, weights_only=True)), rtol=1e-12, atol=1e-12)
    assert f"minimum sharpness {found.minimum_sharpness:.4g}" in run.out and f"trace {found.trace:.4g} →" in run.out
    assert "largest difference of the logits of the weights: " in run.out and f"wrote {out}" in run.out
    assert sorted(path.name for path in plain.parent.iterdir()) == ["in.pth", "out.pth"]


def test_the_trace_of_the_written_file_is_the_minimum_of_the_first(ms, plain):
    out = plain.with_name("out.pth")
    ms("balance", plain, out, *NAMED)
    before, after = (
        json.loads(ms("measure", *NAMED, "--checkpoint", path, "--json", "-").out)["measures"] for path in (plain, out)
    )
    assert before["trace"]["value"] > 1.5 * before["minimum"]["value"]
    assert after["trace"]["value"] == pytest.approx(before["minimum"]["value"], rel=1e-9)
    assert after["minimum"]["value"] == pytest.approx(before["minimum"]["value"], rel=1e-9)


def test_the_gauge_is_passed_on(ms, plain):
    out = plain.with_name("out.pth")
    run = ms("balance", plain, out, *NAMED, "--gauge", 1)
    assert run.code == 0 and "minimum sharpness" not in run.out  # what norms decide is not the smallest trace
    model = unbalanced()
    ms_optim.rebalance_(model, project.batches(), gauge=1.0)
    written = torch.load(out, weights_only=True)
    torch.testing.assert_close(written["1.weight"], model.get_parameter("1.weight").detach(), rtol=1e-12, atol=0)


def test_weights_of_float64_keep_their_precision_when_traces_are_measured_in_float32(ms, plain):
    out = plain.with_name("out.pth")
    assert ms("balance", plain, out, *NAMED[:-1], "float32").code == 0
    before, after = (torch.load(path, weights_only=True) for path in (plain, out))
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-12, atol=1e-12)


def test_a_checkpoint_of_timm_keeps_its_layout_and_its_average(ms, timm_checkpoint, tmp_path):
    out = tmp_path / "out.pth.tar"
    run = ms("balance", timm_checkpoint, out, *QUICK, "--columns", 2)
    assert (run.code, run.err) == (0, "") and "state_dict_ema was rescaled along" in run.out
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        before, after = (torch.load(path, weights_only=True) for path in (timm_checkpoint, out))
    assert list(before) == list(after)
    assert {key: before[key] for key in ("epoch", "arch", "args", "version", "metric")} == {
        key: after[key] for key in ("epoch", "arch", "args", "version", "metric")
    }
    timm = pytest.importorskip("timm")
    x = torch.randn(4, 3, 32, 32, dtype=torch.float32)
    for key in ("state_dict", "state_dict_ema"):
        results = []
        for content in (before, after):
            model = timm.create_model("test_resnet", num_classes=7).float().eval()
            model.load_state_dict(content[key])
            with torch.no_grad():
                results.append(model(x))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4 * float(results[0].abs().max()))
        assert type(after[key]) is type(before[key]) and after[key]._metadata == before[key]._metadata
        moved = [name for name, value in before[key].items() if not torch.equal(value, after[key][name])]
        assert "conv1.0.weight" in moved and "bn1.running_var" in moved and "fc.bias" not in moved
        assert [value.dtype for value in before[key].values()] == [value.dtype for value in after[key].values()]
    # One rescaling for both: what was equal in ratio stays so.
    name = "fc.weight"
    factors = [float(after[k][name].norm() / before[k][name].norm()) for k in ("state_dict", "state_dict_ema")]
    assert factors[0] == pytest.approx(factors[1], rel=1e-5) and abs(factors[0] - 1) > 1e-3


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_keep_their_prefix(ms, tmp_path, prefix):
    state = {prefix + name: value for name, value in unbalanced().state_dict().items()}
    torch.save({"model": state, "step": 3}, tmp_path / "in.pth")
    assert ms("balance", tmp_path / "in.pth", tmp_path / "out.pth", *NAMED).code == 0
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written) == ["model", "step"] and list(written["model"]) == list(state)
    assert not torch.equal(written["model"][prefix + "1.weight"], state[prefix + "1.weight"])


def test_safetensors_stay_safetensors(ms, tmp_path):
    files = pytest.importorskip("safetensors.torch")
    files.save_file(unbalanced().state_dict(), tmp_path / "in.safetensors", {"format": "pt"})
    assert ms("balance", tmp_path / "in.safetensors", tmp_path / "out.safetensors", *NAMED).code == 0
    written = files.load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(logits(written), logits(unbalanced().state_dict()), rtol=1e-12, atol=1e-12)


def test_one_matrix_under_two_names_stays_one(ms, tmp_path):
    torch.manual_seed(2)
    torch.save(project.Tied().state_dict(), tmp_path / "in.pth")
    given = ("--model", "cli.project:Tied", "--data", "cli.project:inputs")
    assert ms("balance", tmp_path / "in.pth", tmp_path / "out.pth", *given).code == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("in.pth", "out.pth"))
    assert not torch.equal(after["first.weight"], before["first.weight"])
    assert after["first.weight"].data_ptr() == after["second.weight"].data_ptr()


def test_half_precision_is_kept_and_judged_by_its_rounding(ms, tmp_path):
    state = {name: value.bfloat16() for name, value in unbalanced().state_dict().items()}
    torch.save(state, tmp_path / "in.pth")
    assert ms("balance", tmp_path / "in.pth", tmp_path / "out.pth", *NAMED).code == 0
    assert {value.dtype for value in torch.load(tmp_path / "out.pth", weights_only=True).values()} == {torch.bfloat16}


def test_a_balanced_checkpoint_stays_where_it_is(ms, plain):
    first, second = plain.with_name("first.pth"), plain.with_name("second.pth")
    ms("balance", plain, first, *NAMED)
    ms("balance", first, second, *NAMED)
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-7, atol=0)


def test_nothing_is_overwritten_unless_forced(ms, refused, plain):
    out = plain.with_name("out.pth")
    out.write_bytes(b"precious")
    assert "out.pth exists already; --force overwrites it" in refused("balance", plain, out, *NAMED)
    assert out.read_bytes() == b"precious"
    assert ms("balance", plain, out, *NAMED, "--force").code == 0
    assert ms("balance", plain, plain, *NAMED, "--force").code == 0
    assert torch.equal(torch.load(plain, weights_only=True)["1.weight"], torch.load(out, weights_only=True)["1.weight"])


@pytest.mark.parametrize("layout", ["one", "several"])
def test_the_state_of_an_optimizer_is_refused_or_left_out_aloud(ms, refused, tmp_path, layout):
    model = unbalanced()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = optimizer.state_dict() if layout == "one" else [optimizer.state_dict()]
    torch.save({"state_dict": model.state_dict(), "optimizers": state, "epoch": 2}, tmp_path / "in.pth")
    line = refused("balance", tmp_path / "in.pth", tmp_path / "out.pth", *NAMED)
    assert "holds the state of an optimizer (optimizers)" in line and "--drop-optimizer-state" in line
    assert not (tmp_path / "out.pth").exists()
    run = ms("balance", tmp_path / "in.pth", tmp_path / "out.pth", *NAMED, "--drop-optimizer-state")
    assert run.code == 0 and "left out: optimizers" in run.out
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == ["state_dict", "epoch"]


def test_a_function_that_changed_is_exit_code_1_and_leaves_nothing(ms, plain, monkeypatch):
    from ms_optim.cli import balance

    def spoiled(model, like):
        state = true(model, like)
        state["3.bias"] = state["3.bias"] + 1e-3
        return state

    true = balance.state_of
    monkeypatch.setattr(balance, "state_of", spoiled)
    run = ms("balance", plain, plain.with_name("out.pth"), *NAMED)
    assert run.code == 1 and run.err.count("\n") == 1
    assert "the balanced weights compute another function" in run.err and "has not been written" in run.err
    assert [path.name for path in plain.parent.iterdir()] == ["in.pth"]


def test_an_interruption_while_writing_leaves_what_was_there(ms, plain, monkeypatch):
    out = plain.with_name("out.pth")
    out.write_bytes(b"precious")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", interrupted)
    run = ms("balance", plain, out, *NAMED, "--force")
    assert run.code == 130 and out.read_bytes() == b"precious"
    assert sorted(path.name for path in plain.parent.iterdir()) == ["in.pth", "out.pth"]


def test_without_a_symmetry_the_copy_is_exact_and_a_warning_says_so(ms, tmp_path):
    model = project.smooth()
    torch.save(model.state_dict(), tmp_path / "in.pth")
    given = ("--model", "cli.project:smooth", "--data", "cli.project:inputs")
    run = ms("balance", tmp_path / "in.pth", tmp_path / "out.pth", *given)
    assert run.code == 0 and run.err.startswith("ms-optim: warning: Sequential has no scale symmetry")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gauge", 2), "--gauge must be in [0, 1], got 2.0"),
        (("--columns", -1), "columns"),
        (("--ema",), "has no average of the weights"),
        (("--model-kwargs", "width=5"), "1.weight has shape (12, 64) there and (5, 64) in the model"),
        (("--data", "cli.project:overflowing"), "non-finite values"),
    ],
)
def test_what_cannot_be_balanced_is_refused_in_one_line(refused, plain, arguments, said):
    assert said in refused("balance", plain, plain.with_name("out.pth"), *NAMED, *arguments)
    assert not plain.with_name("out.pth").exists()


def test_a_place_that_cannot_be_written_is_refused_first(refused, plain):
    assert "there is no folder" in refused("balance", plain, plain.parent / "none" / "out.pth", *NAMED)
