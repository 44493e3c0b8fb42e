"""One rank of a gloo group, as a program: trains the toy, saves or resumes, and prints its loss curve as JSON.

python two_ranks.py RENDEZVOUS RANK WORLD STAGE PRECISION save|resume FOLDER
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from toy import Toy, toy_batch

from pixellm.jobs.train import ranks
from pixellm.jobs.train.checkpoints import CheckpointFolder
from pixellm.jobs.train.deepspeed_engine import TrainEngine
from pixellm.jobs.train.snapshot import load_optimizer_state, load_weights, save_snapshot
from pixellm.platform.settings import TrainSettings

PLACES, STEPS, SAVED_STEP = 4, 5, 2


def main() -> None:
    rendezvous, rank, world, stage, precision, mode, folder = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world))
    model = Toy(always_runs_head=int(stage) == 3)
    checkpoints = CheckpointFolder(Path(folder))
    checkpoint = checkpoints.latest_valid()[0] if mode == "resume" else None
    if checkpoint is not None:
        load_weights(model, checkpoint, only_trainable=False)
    engine = TrainEngine.build(model, TrainSettings(precision=precision, zero_stage=int(stage), lr=1e-2))  # type: ignore[arg-type]
    if checkpoint is not None:
        load_optimizer_state(engine, checkpoint)
    per_rank = PLACES // int(world)
    curve = {}
    for step in range(checkpoint.meta.step if checkpoint else 0, STEPS):
        batches = [toy_batch(step, int(rank) * per_rank + index) for index in range(per_rank)]
        result = engine.train_step(batches, step=step, lr=1e-2)
        curve[step] = ranks.sum_over_ranks([result.loss])[0] / int(world)
        if mode == "save" and step + 1 == SAVED_STEP:
            save_snapshot(engine, checkpoints, step=SAVED_STEP, position=8, only_trainable=False, config={})
    if int(rank) == 0:
        print(json.dumps(curve))
    dist.barrier()


main()
