"""What two ranks see of WebDataset shards: run by torchrun with the folder of the shards."""

import json
import sys

from torch import distributed as dist
from train.command import loaded

from ms_optim.train.order import Ranks

if __name__ == "__main__":
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    given = {"dataset": "wds/pictures", "data_dir": sys.argv[1], "num_classes": 3, "batch_size": 4, "crop_pct": 1.0}
    loader = loaded(ranks=ranks, **given).validation
    seen, batches = [], 0
    for x, _ in loader:
        batches += 1
        real = loader.real - len(seen)
        seen += [int(n) for n in (x[:real, 0, 0, 0] * 0.25 + 0.5).mul(255).round()]
    lines = [None] * ranks.world
    dist.all_gather_object(lines, {"numbers": seen, "batches": batches, "real": loader.real})
    if ranks.rank == 0:
        print("\n".join(map(json.dumps, lines)))
    dist.destroy_process_group()
