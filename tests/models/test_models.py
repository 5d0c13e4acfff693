"""The networks of the papers have the sizes that the papers state."""

import inspect
import math
import re

import pytest
import timm
import torch

from ms_optim import models

GREY, COLOUR = (1, 28, 28), (3, 32, 32)

# name: (network, input shape, parameters counted by hand from the layer table)
COUNTED = {
    # 784·512 + 512 + 512·128 + 128 + 128·512 + 512 + 512·10 + 10
    "mlp": (models.mlp, GREY, 538_762),
    "mlp without biases": (lambda: models.mlp(bias=False), GREY, 784 * 512 + 512 * 128 + 128 * 512 + 512 * 10),
    "digits_mlp": (models.digits_mlp, (1, 8, 8), 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
    "small_fcnn": (models.small_fcnn, GREY, 784 * 20 + 20 + 20 * 20 + 20 + 20 * 10 + 10),
    "small_cnn": (models.small_cnn, GREY, 25 * 20 + 20 + 20 * 25 * 20 + 20 + 320 * 10 + 10),
    "lenet": (
        models.lenet,
        GREY,
        (25 * 6 + 6) + (6 * 25 * 16 + 16) + (16 * 25 * 120 + 120) + (120 * 49 * 84 + 84) + (84 * 10 + 10),
    ),
    # stem 9·16, blocks 2·9·16² and 9·16·32 + 9·32², 2 numbers per channel of each BatchNorm, head
    "small_resnet": (
        models.small_resnet,
        (1, 8, 8),
        9 * 16 + 2 * 9 * 16**2 + 9 * 16 * 32 + 9 * 32**2 + 2 * (3 * 16 + 2 * 32) + 32 * 10 + 10,
    ),
    # timm's resnet18 for ImageNet has 11,689,512 (torchvision's documentation); minus the classes, minus the 7×7 stem
    "resnet18": (models.resnet18, COLOUR, 11_689_512 - 513_000 + 5_130 - 49 * 3 * 64 + 9 * 3 * 64),
    # embedding of 4×4×3 patches; per block three affine maps' 384 (two of them of offset and gain, two layer scales),
    # one linear map over 64 tokens, an MLP over channels; the last affine map; head
    "resmlp": (
        models.resmlp,
        COLOUR,
        (48 * 384 + 384)
        + 12 * (2 * 2 * 384 + 2 * 384 + (64 * 64 + 64) + 2 * 4 * 384**2 + 5 * 384)
        + 2 * 384
        + 3_850,
    ),
    # per block two LayerNorms, an MLP of half of 512 over 64 tokens, one of four times 512 over channels
    "mixer": (
        models.mixer,
        COLOUR,
        (48 * 512 + 512)
        + 8 * (4 * 512 + (2 * 64 * 256 + 256 + 64) + 2 * 4 * 512**2 + 5 * 512)
        + 2 * 512
        + 5_130,
    ),
    # class token and 65 positions; per block two LayerNorms, queries, keys, values and projection, an MLP
    "vit_tiny": (
        models.vit_tiny,
        COLOUR,
        (48 * 192 + 192)
        + 66 * 192
        + 12 * (4 * 192 + (4 * 192**2 + 4 * 192) + 2 * 4 * 192**2 + 5 * 192)
        + 2 * 192
        + 1_930,
    ),
}

# name: (network, millions of parameters as printed in the paper's table)
PRINTED = {
    # arXiv 1512.03385, Table 6
    "ResNet-20": (lambda: models.cifar_resnet(20), "0.27"),
    "ResNet-32": (lambda: models.cifar_resnet(32), "0.46"),
    "ResNet-44": (lambda: models.cifar_resnet(44), "0.66"),
    "ResNet-56": (lambda: models.cifar_resnet(56), "0.85"),
    "ResNet-110": (lambda: models.cifar_resnet(110), "1.7"),
    # arXiv 1605.07146
    "WRN-16-8": (lambda: models.wide_resnet(16, 8), "11.0"),
    "WRN-22-8": (lambda: models.wide_resnet(22, 8), "17.2"),
    "WRN-40-4": (lambda: models.wide_resnet(40, 4), "8.9"),
    "WRN-28-10": (models.wide_resnet, "36.5"),
    # as reported for CIFAR-10 in the SAM literature
    "PreAct-ResNet-18": (models.preact_resnet18, "11.17"),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_count_is_the_one_counted_by_hand(name):
    build, shape, count = COUNTED[name]
    model = build()
    assert parameters(model) == count
    assert model(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_count_is_the_one_printed_in_the_paper(name):
    build, printed = PRINTED[name]
    with torch.device("meta"):  # counting needs no values
        count = parameters(build())
    # One unit of the last printed digit: some tables round (36.48 -> 36.5), some cut (8.95 -> 8.9).
    assert abs(count / 1e6 - float(printed)) < 10.0 ** -len(printed.partition(".")[2])


@pytest.mark.parametrize(
    "build",
    [lambda: models.cifar_resnet(20), lambda: models.wide_resnet(10, 1), models.preact_resnet18],
    ids=["cifar_resnet", "wide_resnet", "preact_resnet18"],
)
def test_residual_networks_map_images_to_logits(build):
    model = build()
    logits = model(torch.randn(2, *COLOUR))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


FUNCTIONS = [
    value for name, value in vars(models).items() if name in models.__all__ and inspect.isfunction(value)
]
NETWORKS = [function for function in FUNCTIONS if function is not models.small_stem]


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_every_function_takes_the_number_of_classes(build):
    depth = {"depth": 8} if build is models.cifar_resnet else {}
    with torch.device("meta"):
        *_, last = build(num_classes=7, **depth).parameters()
    assert last.shape == (7,)


@pytest.mark.parametrize("build", [models.resnet18, models.resmlp, models.mixer, models.vit_tiny, models.small_resnet])
def test_other_channels_than_three_are_taken(build):
    key = "in_channels" if build is models.small_resnet else "in_chans"
    assert build(**{key: 2})(torch.randn(2, 2, 32, 32)).shape == (2, 10)


COUNTS = {build: re.findall(r"([\d,]+) parameters", build.__doc__) for build in NETWORKS}


@pytest.mark.parametrize("build", [build for build in NETWORKS if COUNTS[build]], ids=lambda build: build.__name__)
def test_a_docstring_that_counts_parameters_counts_them_right(build):
    with torch.device("meta"):
        assert COUNTS[build] == [f"{parameters(build()):,}"]


# The stem for small images.

STEMS = ["resnet18", "resnet34", "resnet50", "resnet18d", "resnet50t", "seresnet50", "resnetrs50"]


@pytest.mark.parametrize("name", STEMS)
def test_the_stem_for_small_images_keeps_their_size_and_all_else(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
        before = {key: p.shape for key, p in model.named_parameters()}
        assert models.small_stem(model) is model
        after = {key: p.shape for key, p in model.named_parameters()}
        x = torch.empty(2, *COLOUR)
        assert model.maxpool(model.act1(model.bn1(model.conv1(x)))).shape[2:] == (32, 32)
        assert model.forward_features(x).shape[2:] == (4, 4)  # three stages that halve
        assert model(x).shape == (2, 10)
    changed = {key for key in before if before[key] != after.get(key)}
    # A pooling that is made of layers (resnetrs50's) goes with them.
    assert {key for key in changed if not key.startswith("maxpool.")} == ({"conv1.weight"} & set(before))
    assert set(after) <= set(before)


def test_the_small_stem_starts_as_every_convolution_here_does_and_stays_where_the_network_is():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).to(torch.float64)
    models.small_stem(model)
    assert model.conv1.weight.dtype is torch.float64 and model.conv1.bias is None
    # 1,728 draws: relative error of the sample standard deviation 1/√(2n) ≈ 0.017; four of them.
    assert abs(model.conv1.weight.std().item() / math.sqrt(2 / (9 * 64)) - 1) < 0.07


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_a_stem_that_is_small_already_keeps_its_weights(name):
    model = models.small_stem(timm.create_model(name, num_classes=10))
    before = {key: p.clone() for key, p in model.named_parameters()}
    models.small_stem(model)
    assert all(torch.equal(before[key], p) for key, p in model.named_parameters())


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: timm.create_model("test_vit"), "VisionTransformer.*patch_embed"),
        (lambda: timm.create_model("test_efficientnet"), "EfficientNet.*conv_stem"),
        (lambda: models.cifar_resnet(8), "ResNet has no stem of conv1 and maxpool"),
        (lambda: torch.nn.Identity(), "Identity has no stem of conv1 and maxpool.*nothing"),
    ],
    ids=["vit", "efficientnet", "cifar_resnet", "identity"],
)
def test_a_network_without_such_a_stem_is_refused_by_name(build, named):
    with pytest.raises(ValueError, match=named):
        models.small_stem(build())


def test_mlp_flattens_its_input():
    model = models.MLP((6, 4, 3))
    x = torch.randn(5, 1, 2, 3)
    assert torch.equal(model(x), model(x.flatten(1)))
    assert model[-1](torch.relu(model[1](x.flatten(1)))).equal(model(x))


def test_shortcut_of_option_a_is_the_subsampled_image_in_the_middle_channels():
    block = models.BasicBlock(2, 6, stride=2)
    torch.nn.init.zeros_(block.bn2.weight)  # the residual branch is zero, φ(x') remains
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 4:].any()


def test_convolutions_start_at_variance_two_over_fan_out():
    weight = models.ResNet((1,), (256,)).blocks[0].conv1.weight
    std = math.sqrt(2 / (9 * 256))
    # 589,824 draws: the sample standard deviation has relative error 1/√(2n) ≈ 1e-3; five of them.
    assert abs(weight.std().item() / std - 1) < 5e-3


def test_wide_resnet_28_10_maps_images_to_logits_on_the_meta_device():
    with torch.device("meta"):
        assert models.wide_resnet()(torch.randn(2, *COLOUR)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.cifar_resnet(21), "6n [+] 2"),
        (lambda: models.cifar_resnet(2), "6n [+] 2"),
        (lambda: models.wide_resnet(27), "6n [+] 4"),
        (lambda: models.wide_resnet(28, 0), "width must be at least 1, got 0"),
        (lambda: models.MLP((3,)), "at least an input and an output width"),
    ],
)
def test_impossible_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
