r"""Demo: five optimizers on handwritten digits, from the usual start and from an equivalent, badly scaled one.

A network and its rescaling by an element t of its scale group, W_p → exp((B t)_p) W_p, compute the same function.
Each run is made twice from the same initial weights, once as they are and once rescaled by a random t.  What an
optimizer loses between the two is the price of depending on the scaling; the minimum sharpness of the two starts is
equal, for it depends on the function alone (arXiv 2106.12612).

Data: scikit-learn's digits, 1,797 real images of 8×8 pixels.  Each seed draws its own 1,000 for training (the rest is
the test set), initial weights, order of batches and t; all optimizers share them, so differences are paired.

    python -m ms_optim.demo --help
"""
