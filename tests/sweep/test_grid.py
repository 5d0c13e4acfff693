"""Grids: values keep their types, every optimizer has its own axes, and problems are told from methods."""

import pytest

from ms_optim.errors import CommandLineError
from ms_optim.sweep import grid
from ms_optim.sweep.grid import Method, axis, methods, settings, trials

OPTIONS = frozenset({"lr", "opt", "opt_kwargs", "epochs", "weight_decay", "label_noise", "dataset"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("1E3", 1000.0), ("-2.5e+2", -250.0), (".5e-1", 0.05), ("0.1", 0.1), ("7", 7)),
        *(("true", True), ("sgd", "sgd"), ("1e", "1e"), ("e3", "e3"), ("'1e-3'", "1e-3"), ("null", None)),
        *(("[1e-3, 2]", [1e-3, 2]), ("{rho: 1e-2}", {"rho": 0.01})),
    ],
)
def test_values_are_what_they_look_like(text, value):
    found = grid.scalar(text)
    assert found == value and type(found) is type(value)


def test_an_axis_has_an_owner_a_name_and_values():
    assert axis("lr=0.1,1e-3") == ("", "lr", [0.1, 1e-3])
    assert axis("weight-decay=0,1e-4") == ("", "weight_decay", [0, 1e-4])
    assert axis("sam:rho=0.05") == ("sam", "rho", [0.05])
    assert axis("amp=true,false") == ("", "amp", [True, False])
    assert axis("input_size=[3,32,32],[3,64,64]") == ("", "input_size", [[3, 32, 32], [3, 64, 64]])
    assert axis("opt_kwargs.rho=1") == ("", "opt_kwargs.rho", [1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "not of the form"),
        ("=3", "not of the form"),
        ("lr=", "lr needs values"),
        ("lr=0.1,,0.2", "needs values|cannot read"),
        ("lr=0.1,0.1", "value 0.1 twice"),
        ("lr=[1,2", "cannot read"),
    ],
)
def test_an_axis_that_is_none_is_refused(text, said):
    with pytest.raises(CommandLineError, match=said):
        axis(text)


def test_every_optimizer_has_the_shared_axes_and_its_own():
    words = ("opt=sgd,sam,msreg", "lr=0.1,0.2", "sam:rho=0.05,0.1", "msreg:strength=1e-3")
    found = methods([axis(word) for word in words])
    assert [(m.name, dict(m.axes)) for m in found] == [
        ("sgd", {"opt": ["sgd"], "lr": [0.1, 0.2]}),
        ("sam", {"opt": ["sam"], "lr": [0.1, 0.2], "rho": [0.05, 0.1]}),
        ("msreg", {"opt": ["msreg"], "lr": [0.1, 0.2], "strength": [1e-3]}),
    ]
    assert found[1].settings()[1] == {"opt": "sam", "lr": 0.1, "rho": 0.1}
    assert [len(m.settings()) for m in found] == [2, 4, 2]
    assert [m.name for m in methods([axis("lr=1")], "adamw")] == ["adamw"]
    assert methods([axis("lr=1")])[0] == Method("all", {"lr": [1]})
    with pytest.raises(CommandLineError, match="for asam, which is not in opt=sgd"):
        methods([axis("opt=sgd"), axis("asam:rho=1")])
    with pytest.raises(CommandLineError, match="two axes lr for sgd"):
        methods([axis("opt=sgd"), axis("lr=1"), axis("sgd:lr=2")])


def test_what_training_does_not_know_goes_to_the_optimizer_and_the_recipe_stays_as_it_is():
    base = {"lr": 0.1, "opt_kwargs": {"gauge": 1.0}}
    found = settings(base, {"lr": 0.2, "rho": 0.05, "opt_kwargs.eta": 3}, OPTIONS)
    assert found == {"lr": 0.2, "opt_kwargs": {"gauge": 1.0, "rho": 0.05, "eta": 3}}
    assert base == {"lr": 0.1, "opt_kwargs": {"gauge": 1.0}}
    assert settings({}, {"rho": 0.05}, None) == {"rho": 0.05}  # of another function than training
    with pytest.raises(CommandLineError, match="no mapping"):
        settings({"lr": 0.1}, {"lr.x": 1}, OPTIONS)


def test_trials_are_the_product_with_the_seeds():
    made = trials(
        {"digits": {"epochs": 3, "seed": 42}}, {"digits": methods([axis("opt=sgd,sam"), axis("lr=1,2")])}, [0, 1]
    )
    assert len({trial.key("a:b") for trial in made}) == len(made) == 8
    assert [(t.method, t.settings["lr"], t.seed) for t in made[:3]] == [("sgd", 1, 0), ("sgd", 1, 1), ("sgd", 2, 0)]
    assert {t.problem for t in made} == {"digits"} and made[0].settings["epochs"] == 3
    with pytest.raises(CommandLineError, match="seeds has the value 1 twice"):
        trials({"": {}}, {"": [Method("a")]}, [1, 1])


def test_data_that_differ_make_problems_and_recipes_of_one_problem_are_compared():
    def problems(bases, *words):
        made = trials(bases, {n: methods([axis(w) for w in words], b.get("opt", "")) for n, b in bases.items()}, [0])
        return sorted({(trial.problem, trial.method) for trial in made})

    noise = problems({"digits": {}}, "opt=sgd,sam", "label_noise=0,0.2")
    assert noise == [(f"label_noise = {n}", opt) for n in ("0", "0.2") for opt in ("sam", "sgd")]
    # A recipe for each optimizer of one problem: one comparison.
    alike = {"cifar_resnet_sgd": {"opt": "sgd", "dataset": "c"}, "cifar_resnet_sam": {"opt": "sam", "dataset": "c"}}
    assert problems(alike) == [("cifar_resnet", "sam"), ("cifar_resnet", "sgd")]
    # The same optimizer in two recipes that differ in something else: nothing is chosen between the recipes.
    longer = {"short": {"epochs": 1}, "long": {"epochs": 9}}
    assert problems(longer, "opt=sgd") == [("long", "sgd"), ("short", "sgd")]
    data = {"a": {"dataset": "mnist"}, "b": {"dataset": "digits"}}
    assert problems(data, "opt=sgd") == [("dataset = digits", "sgd"), ("dataset = mnist", "sgd")]


def test_sgd_goes_without_the_options_of_sam():
    both = methods([axis("opt=sgd,mssam,unheardof"), axis("rho=0.1,0.2"), axis("lr=1")])
    found = [grid.without_strangers(each, OPTIONS) for each in both]
    assert [(list(method.axes), strange) for method, strange in found] == [
        (["opt", "lr"], ["rho"]),
        (["opt", "rho", "lr"], []),
        (["opt", "rho", "lr"], []),
    ]


def test_a_file_is_names_and_values(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 1e-3\nopt: sam\n")
    assert grid.mapping_in(file, "-c") == {"lr": 1e-3, "opt": "sam"}
    for text, said in (("- 1", "holds a list"), ("a: [1", "cannot read")):
        file.write_text(text)
        with pytest.raises(CommandLineError, match=said):
            grid.mapping_in(file, "-c")
    with pytest.raises(CommandLineError, match="No such file"):
        grid.mapping_in(tmp_path / "b.yaml", "-c")
