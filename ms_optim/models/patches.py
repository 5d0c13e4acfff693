"""Networks on patches for 32×32 images: timm's ResMLP, Mixer and vision transformer, each of the smallest kind.

A patch is 4×4, so an image is 64 tokens; embedding and depth are those of the network of that name for ImageNet.  All
that differs is the number of tokens, hence the layers that mix them, the patches' embedding and the positions'.
"""

from __future__ import annotations

from torch import nn


def resmlp(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """ResMLP-S12 of arXiv 2105.03404 in patches of 4×4: embedding 384, depth 12, 14,279,818 parameters.

    Affine maps in the place of normalisers; a block is one linear map over tokens and an MLP of 1,536 over channels.

    Args:
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Returns:
        The network, for inputs ``[N, in_chans, 32, 32]``.
    """
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    model: nn.Module = MlpMixer(
        num_classes,
        img_size=32,
        in_chans=in_chans,
        patch_size=4,
        num_blocks=12,
        embed_dim=384,
        mlp_ratio=4,
        block_layer=ResBlock,
        norm_layer=Affine,
    )
    return model


def mixer(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """Mixer-S of arXiv 2105.01601 in patches of 4×4: embedding 512, depth 8, 17,110,026 parameters.

    A block is an MLP of 256 over tokens and one of 2,048 over channels, each after a LayerNorm.

    Args:
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Returns:
        The network, for inputs ``[N, in_chans, 32, 32]``.
    """
    from timm.models.mlp_mixer import MlpMixer

    model: nn.Module = MlpMixer(
        num_classes, img_size=32, in_chans=in_chans, patch_size=4, num_blocks=8, embed_dim=512, mlp_ratio=(0.5, 4.0)
    )
    return model


def vit_tiny(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """ViT-Ti of arXiv 2012.12877 in patches of 4×4: embedding 192, depth 12, 3 heads, 5,362,762 parameters.

    Args:
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Returns:
        The network, for inputs ``[N, in_chans, 32, 32]``.
    """
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=32, patch_size=4, in_chans=in_chans, num_classes=num_classes, embed_dim=192, depth=12, num_heads=3
    )
    return model
