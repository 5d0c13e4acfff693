"""Command line: the measures and the doctor for a model that lies in a file, without writing any code.

    ms-optim measure --model resnet18 --checkpoint best.pth --data imagenet/
    ms-optim symmetries --model resnet18
    ms-optim balance best.pth balanced.pth --model resnet18 --data imagenet/
    ms-optim doctor --loop train.py:one_step

Each command is a file: what it is asked, what it does, what it prints.  ``models``, ``checkpoint`` and ``data`` read
what is measured, ``named_object`` finds what is the user's own, ``table``, ``measurement`` and ``figure`` show what
came of it, ``output`` writes files whole or not at all, and ``command`` is the border: every error is one line there,
and every outcome an exit code.
"""

from .command import main

__all__ = ["main"]
