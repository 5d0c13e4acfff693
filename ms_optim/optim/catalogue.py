"""Catalogue: every optimizer with its formula, cost, invariances and source, as the README's table shows it.

Invariance is that of a step's perturbation or penalty under rescalings that leave the function unchanged, with the
defaults; ``rebalance="rows"`` and ``"move"`` make all of them (perturbation and descent) invariant under the layer-wise
ones.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        formula: Where the gradient is taken, or what is descended along.
        passes: Forward and backward passes a step.
        invariant: Under what.
        source: Where it is from.
    """

    formula: str
    passes: str
    invariant: str
    source: str


OPTIMIZERS: dict[str, Row] = {
    "MSSAM": Row(
        "ε_p = ρ w_p g_p / √(Σ w_q ‖g_q‖²), w = α⁻²", "2", "layers, or single units", "2106.12612, 2010.01412"
    ),
    "MSRegularizedSGD": Row(
        "g + λ ∇ min_α Σ c_p / α_p², or the gradient at W + z, z ~ N(0, 2 λ w)",
        "1",
        "layers, or single units",
        "2106.12612",
    ),
    "SAM": Row("ε = ρ g / ‖g‖", "2", "none", "2010.01412"),
    'SAM(ascent="momentum")': Row("ε = −ρ m / ‖m‖, m the base optimizer's momentum", "1", "none", "2401.12033"),
    'SAM(ascent="previous")': Row("ε = ρ g' / ‖g'‖, g' of the step before", "1", "none", "2206.06232"),
    "ASAM": Row(
        "ε = ρ T² g / ‖T g‖; T = |W| + η on weights, |W|, ‖filter‖ or ‖W_p‖",
        "2",
        "layers (not with η > 0); single units, too, but for ‖W_p‖",
        "2102.11600, 2306.04226",
    ),
    "SAMON": Row("SAM's or ASAM's ε in normalisation layers only", "2", "scales before normalisers", "2306.04226"),
    "SAGM": Row("ε = (ρ / ‖g‖ − a) g; along (g + g_ε) / 2", "2", "none", "2303.10353"),
    "StableSAM": Row("SAM's ε; along g_ε ‖g‖ / ‖g_ε‖", "2", "none", "2401.07250"),
    "GSAM": Row("SAM's ε; along g_ε − α (g − ⟨g, g_ε⟩ g_ε / ‖g_ε‖²)", "2", "none", "2203.08065"),
    "LookSAM": Row("SAM in every k-th step; else along g + α ‖g‖ g_v / ‖g_v‖", "1 + 1/k", "none", "2203.02714"),
    "FriendlySAM": Row("ε = ρ d / ‖d‖, d = g − σ m, m an average of g", "2", "none", "2403.12350"),
    "TiltedSAM": Row("Σ softmax(t L_j) g_j at s noisy points, SAM's ε from each", "2 s", "none", "2410.22656"),
    "RSAM": Row("ε = −sign(1 − a) ρ (Σ |g|²ᵃ / (Σ g²)ᵃ⁺¹) g", "2", "none", "2510.07758"),
    "TraceSAM": Row("the gradient at W + ρ v, v ~ N(0, I)", "1", "none", "2406.03682"),
    "FrobSAM": Row("g + (λ/ρ²) Cov(L_i, g_i) over n points W + ρ v_i", "1 + n", "none", "2406.03682"),
    "DetSAM": Row("g + λ e^{L₁ − L} (g₁ − g), W + v uniform in a cube", "1 + n", "none", "2406.03682"),
    "UniversalSAM": Row(
        "g + λ Σ c_i (g_i − g), c = ∂φ(mean ψ(d)) / ∂d, d = (L_i − L) / ρ²", "1 + n", "none", "2406.03682"
    ),
    "RandomPerturbation": Row(
        "the gradient at W + z, z ~ N(0, σ² ‖W_p‖² / d_p), or filter by filter", "1", "layers", "after 2201.08025"
    ),
    "BAR": Row(
        "x ← (1 ± a lr) x, y ← (1 ∓ a lr) y before the step, for every pair", "1", "moves the balance", "2410.14802"
    ),
    "WEISSI": Row("g + ∇ (λ₁ Σ log ‖W_l‖ + λ₂ Σ ‖W_l‖₁ / ‖W_l‖)", "1", "layers without biases", "2008.02965"),
}


def as_markdown() -> str:
    """The table.

    Returns:
        Lines of Markdown.
    """
    head = "| optimizer | formula | passes a step | invariant under rescalings of | source (arXiv) |"
    rows = [
        f"| `{name}` | {row.formula.replace('|', chr(92) + '|')} | {row.passes} | {row.invariant} | {row.source} |"
        for name, row in OPTIMIZERS.items()
    ]
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows])
