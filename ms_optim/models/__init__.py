"""Models: the networks of the papers, at the sizes their tables state.

Recipes, benchmarks and tests take them from here, so that "ResNet-20" is one network everywhere.

Chains      MLP, mlp, digits_mlp, small_fcnn, small_cnn, lenet
Residual    ResNet, cifar_resnet, small_resnet; PreActResNet, preact_resnet18, wide_resnet; timm's resnet18 with the
            stem for small images, and small_stem, which gives it to others
Patches     resmlp, mixer, vit_tiny: timm's, for 32×32 images

Nothing here ends in a softmax: a model returns logits ``[N, K]``.  All functions take ``num_classes``; parameter counts
in the docstrings are for ten.
"""

from .chains import MLP, digits_mlp, lenet, mlp, small_cnn, small_fcnn
from .patches import mixer, resmlp, vit_tiny
from .residual import (
    BasicBlock,
    PreActBlock,
    PreActResNet,
    ResNet,
    cifar_resnet,
    preact_resnet18,
    small_resnet,
    wide_resnet,
)
from .stem import resnet18, small_stem

__all__ = [
    "MLP",
    "BasicBlock",
    "PreActBlock",
    "PreActResNet",
    "ResNet",
    "cifar_resnet",
    "digits_mlp",
    "lenet",
    "mixer",
    "mlp",
    "preact_resnet18",
    "resmlp",
    "resnet18",
    "small_cnn",
    "small_fcnn",
    "small_resnet",
    "small_stem",
    "vit_tiny",
    "wide_resnet",
]
