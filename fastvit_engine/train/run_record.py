"""What a run writes down once, when it starts: its configuration, its environment, and that it started."""

import json
from collections.abc import Mapping

import torch

from fastvit_engine.config import Resolved
from fastvit_engine.files import atomic_write
from fastvit_engine.models import model_title, parameter_count
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.environment import collect_environment
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.units import counted
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.train.diary import record_configuration
from fastvit_engine.train.job import Job


def record_start(
    resolved: Resolved, chosen: Chosen, job: Job, step: int, init: Mapping[str, str] | None = None
) -> None:
    """Writes the configuration (as given), `environment.json` (with what was chosen), and the event.

    init: the weights that the run began with, see `describe_weights`.
    """
    config, world, run = job.config, job.world, job.run
    environment = collect_environment(
        model=model_title(config.model),
        parameters=parameter_count(config.model, config.pretraining),
        training_flops_per_image=job.compute.mean_per_image(job.schedule.phases, job.schedule.total_steps).computed,
        peak_flops=job.peak.flops,
        peak_flops_source=job.peak.source,
        world_size=world.size,
        zero_stage=config.zero.stage,
        objective=config.train.objective,
        precision=config.train.precision,
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        total_steps=job.schedule.total_steps,
        phases=[
            {**phase._asdict(), "training_flops_per_image": job.compute.per_image(phase).computed}
            for phase in job.schedule.phases.phases
        ],
        global_batch_size=config.train.global_batch_size,
        samples_per_epoch=job.schedule.samples_per_epoch,
        shards=", ".join(source.shards for source in config.data.sources),
        init=None if init is None else dict(init),
        **({"accelerated": job.accelerated} if job.accelerated is not None else {}),
        defaults=chosen.record(),
    )
    kept = record_configuration(run, resolved, step)
    if_possible(lambda: atomic_write(run.environment, json.dumps(environment, indent=1)), str(run.environment))
    hosts = sorted(set(job.processes.watchdog.hosts))
    where = f"{counted(world.size, 'process', 'processes')} on {', '.join(hosts)}, ZeRO-{config.zero.stage}"
    message = f"training begins at step {step} of {job.schedule.total_steps}: {where}"
    facts = {"world_size": world.size, "zero_stage": config.zero.stage, "hosts": hosts, "config": kept}
    facts["total_steps"] = job.schedule.total_steps
    record_event(run, "start", message, step=step, **facts)
