"""One rank of a job that trains a tiny ViT in many ways, saves, loads what others saved, and notes what it saw.

Its arguments are FOLDER and JOBS, a JSON list, done one after the other in one process group: {"write": name, "case":
{...}} trains from the beginning, saves after STEPS steps into FOLDER/name and trains on; {"read": name, "case": {...}}
loads that, saves at once what it has loaded, and trains on. Rank 0 appends a JSON line for each job to
FOLDER/results.jsonl.
"""

import json
import sys
from pathlib import Path

import torch

from fastvit_engine.checkpoint import Checkpoint, Checkpointer, TrainerState, open_store, usable_checkpoints
from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.models import build_vit
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_kernels import FusedCrossEntropy

STEPS = 4  # before the checkpoint, and again after it
BATCH = 12  # divides over 1, 2, 3 and 4 processes


def config_of(case) -> Config:
    """Odd sizes, which no number of processes divides; `shard_all` shards parameters that ZeRO-3 would keep whole."""
    zero = {"stage": case["stage"], "offload": case.get("offload", "none")}
    deepspeed = {}
    if case.get("shard_all"):
        deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}}
    return Config.model_validate(
        {
            "model": {"name": "Ti/4", "image_size": 8, "width": 22, "depth": 2, "heads": 2, "mlp_dim": 33}
            | {"num_classes": 7, "layer_scale": 0.1},
            "train": {
                "global_batch_size": BATCH,
                "micro_batch_size": case.get("micro_batch_size"),
                "precision": case.get("precision", "fp32"),
            },
            "optimizer": {"eps": 1e-3, "learning_rate": 3e-3, **case.get("optimizer", {})},
            "zero": zero,
            "deepspeed": deepspeed,
            "checkpoint": {"keep": 100},
        }
    )


class Job:
    def __init__(self, case, seed: int, world: World, folder: Path) -> None:
        self.config, self.world = config_of(case), world
        self.split = split_batch(self.config, world.size)
        torch.manual_seed(seed)
        model = build_vit(self.config.model, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.engine = build_engine(model, self.config, self.split, world)
        self.ema = WeightAverage(self.engine, 0.9) if case.get("ema", True) else None
        self.saver(folder)

    def saver(self, folder: Path) -> None:
        store = open_store(str(folder / "checkpoints"))
        state = (self.engine, self.ema, self.world, self.config.checkpoint)
        self.checkpointer = Checkpointer(RunFolder(folder), store, *state, say=lambda text: None)

    def train(self, first: int, last: int) -> list[float]:
        criterion, losses = FusedCrossEntropy("softmax"), []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            images = torch.randint(0, 256, (BATCH, 8, 8, 3), dtype=torch.uint8, generator=generator)
            labels = torch.randint(0, 7, (BATCH,), generator=generator)
            self.engine.set_learning_rate(3e-3 / (1 + step))
            share = BATCH // self.world.size
            own = slice(self.world.rank * share, (self.world.rank + 1) * share)
            total = torch.zeros(())
            micro = self.split.micro_batch_size
            for x, y in zip(images[own].split(micro), labels[own].split(micro), strict=True):
                loss = criterion(self.engine.model(x), y)
                self.engine.backward(loss)
                self.engine.step()
                total += loss.detach()
            losses.append(self.world.sum([total.item()]).item() / self.split.accumulation_steps / self.world.size)
            if self.ema is not None:
                self.ema.update(step)
        return losses

    def save(self, step: int) -> Checkpoint:
        fingerprint = {"model": self.config.model.model_dump(mode="json")}
        self.checkpointer.save(TrainerState(step, fingerprint))
        saved = self.checkpointer.close()
        assert saved is not None
        return saved


def main(folder: Path, jobs) -> None:
    with join_world() as world:
        for job in jobs:
            name = job.get("write") or job["read"]
            if "write" in job:
                at_work = Job(job["case"], 0, world, folder / name)
                at_work.train(0, STEPS)
                saved = at_work.save(STEPS)
            else:
                at_work = Job(job["case"], 1, world, folder / name)
                at_work.train(0, 1)  # not fresh: what is loaded goes over everything
                source = usable_checkpoints(open_store(str(folder / name / "checkpoints")))[0]
                state = at_work.checkpointer.load(source)
                assert state.step == STEPS
                at_work.saver(folder / f"again-{world.size}" / str(jobs.index(job)))
                saved = at_work.save(STEPS)
            losses = at_work.train(STEPS, 2 * STEPS)
            at_work.engine.close()
            if world.is_main:
                line = {**job, "world": world.size, "saved": str(saved), "losses": losses}
                with open(folder / "results.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
