"""The networks of the papers have the sizes that the papers state."""

import math

import pytest
import torch

from ms_optim import models

GREY, COLOUR = (1, 28, 28), (3, 32, 32)

# name: (network, input shape, parameters counted by hand from the layer table)
COUNTED = {
    # 784·512 + 512 + 512·128 + 128 + 128·512 + 512 + 512·10 + 10
    "mlp": (models.mlp, GREY, 538_762),
    "mlp without biases": (lambda: models.mlp(bias=False), GREY, 784 * 512 + 512 * 128 + 128 * 512 + 512 * 10),
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
