"""Training: ``python -m ms_optim.train -c recipes/cifar10_resnet18_mssam.yaml``.

timm's models, data sets, augmentation, schedules and checkpoints, this package's engine for the steps, on one process
or on many.  Each file is a part: ``options`` and ``config`` are what is asked for, ``preset``, ``datasets``, ``order``,
``augmentation``, ``in_memory`` and ``loaders`` the data, ``network`` and ``optimizer`` what is trained and how;
``steps``, ``epoch``, ``evaluation`` and ``sharpness_log`` happen, ``checkpoint`` and ``record`` stay, ``process`` and
``sharding`` are where; ``training`` puts them together.
"""

from .training import Outcome, run, train

__all__ = ["Outcome", "run", "train"]
