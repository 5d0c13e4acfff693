"""Networks of timm: every parameter has a rule, and its trace is that of the paper's algorithm, sample by sample."""

import math

import pytest
import torch
from curvature.agreement import assert_same
from torch import nn

from ms_optim.curvature import hessian_trace
from ms_optim.reference import curvature as oracle

timm = pytest.importorskip("timm")

# name: (image size, whether the model has to be told)
NETWORKS = {
    "resnet18": (64, False),
    "resnet50": (64, False),
    "resnetv2_50": (64, False),
    "wide_resnet50_2": (64, False),
    "vgg11": (32, False),
    "vgg11_bn": (32, False),
    "densenet121": (64, False),
    "mobilenetv3_small_050": (64, False),
    "efficientnet_b0": (64, False),
    "regnetx_002": (64, False),
    "convnext_atto": (64, False),
    "vit_tiny_patch16_224": (32, True),
    "mixer_s32_224": (64, True),
    "resmlp_12_224": (32, True),
}
# Standardised weights, relative position biases, response normalisation, windows, decomposed attention.
MORE_NETWORKS = {
    "convnextv2_atto": (64, False),
    "resnetv2_50x1_bit": (64, False),
    "nf_resnet26": (64, False),
    "beit_base_patch16_224": (32, True),
    "swin_tiny_patch4_window7_224": (56, True),
    "coatnet_nano_rw_224": (64, True),
    "maxvit_tiny_tf_224": (64, True),
    "xcit_nano_12_p16_224": (32, True),
    "lambda_resnet26t": (64, False),
}
LONG = {"wide_resnet50_2", "vgg11", "vgg11_bn"}


def network(name, size, told, seed=0):
    """A model in float64 whose zeros (last scales of blocks, heads) and ones are somewhere else, and two images."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3, **({"img_size": size} if told else {})).double().eval()
    for parameter in model.parameters():
        if parameter.ndim < 2:
            nn.init.uniform_(parameter, 0.5, 1.0)
        elif not parameter.any():
            nn.init.normal_(parameter, 0.0, 0.1)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():  # where p is 0 or 1, the paper's algorithm subtracts all of its digits away
        scale = 2.0 / model(x).abs().max()
        for parameter in model.get_classifier().parameters():
            parameter *= scale
    return model, x


def check(name, size, told):
    model, x = network(name, size, told)
    traces = hessian_trace(model, x, generic=False)
    assert list(traces) == [name for name, _ in model.named_parameters()]
    assert all(math.isfinite(value) for value in traces.values())
    assert_same(traces, oracle.paper_traces(model, x), relative=1e-8)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in NETWORKS]
)
def test_every_parameter_of_a_network_of_timm_has_its_trace(name):
    check(name, *NETWORKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_NETWORKS)
def test_no_parameter_of_further_networks_needs_the_generic_path(name):
    check(name, *MORE_NETWORKS[name])
