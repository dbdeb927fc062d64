"""The ways to keep less for the backward pass, side by side: what each needs, and what it computes again."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fastvit_engine.config import Config
from fastvit_engine.config.checks import check_config
from fastvit_engine.errors import UserError
from fastvit_engine.models import run_flops
from fastvit_engine.models.flops import recomputed_flops
from fastvit_engine.sizing.activations import checkpointed_blocks, tokens_in_training
from fastvit_engine.sizing.candidates import with_train
from fastvit_engine.sizing.defaults import Chosen, choose, has_blocks, recompute_matters
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.state import Memory

_NO_BLOCK: Mapping[str, Any] = {"activation_checkpointing": 0, "offload_activations": False}
_EVERY_BLOCK: Mapping[str, Any] = {"activation_checkpointing": "all", "offload_activations": False}


class Policy(NamedTuple):
    """Settings of section train, at the stage and the micro-batch that were chosen."""

    settings: Mapping[str, Any]
    memory: Memory
    largest_micro_batch: int | None  # at this stage; None: not even one image fits
    again: float  # operations that are computed a second time, as a share of all others
    is_chosen: bool


def policies(config: Config, chosen: Chosen, machine: Machine) -> list[Policy]:
    """config: what was chosen for. None for what has no blocks of a Transformer that learn."""
    if not has_blocks(config):
        return []
    rows = []
    for settings in _possible(chosen):
        try:
            check_config(with_train(config, **settings))
        except UserError:  # what else is configured does not go with it
            continue
        rows.append(_policy(config, chosen, machine, settings))
    return rows


def _possible(chosen: Chosen) -> Iterator[Mapping[str, Any]]:
    """From what keeps most to what keeps least; what was chosen is one of them."""
    count = checkpointed_blocks(chosen.config)
    if recompute_matters(chosen.config, chosen.machine):
        for mode in ("none", "gelu", "all"):
            yield {"recompute": mode, **_NO_BLOCK}
    else:
        yield _NO_BLOCK
    if 0 < count < checkpointed_blocks(with_train(chosen.config, activation_checkpointing="all")):
        offloads = chosen.config.train.offload_activations
        yield {"activation_checkpointing": count, "offload_activations": offloads}
    yield _EVERY_BLOCK
    if chosen.machine.on_gpu:
        yield {**_EVERY_BLOCK, "offload_activations": True}


def _policy(config: Config, chosen: Chosen, machine: Machine, settings: Mapping[str, Any]) -> Policy:
    there = with_train(chosen.config, **settings, micro_batch_trial=False)  # which begins with this micro-batch
    blocks = checkpointed_blocks(there)
    again = recomputed_flops(tokens_in_training(there), there.model, blocks) / run_flops(there).computed
    is_chosen = (
        blocks == checkpointed_blocks(chosen.config)
        and there.train.recompute == chosen.config.train.recompute
        and there.train.offload_activations == chosen.config.train.offload_activations
    )
    free = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": chosen.config.zero.stage})})
    largest = largest_micro_batch(with_train(free, **settings), machine)
    return Policy(settings, choose(there, machine).memory, largest, again, is_chosen)


def largest_micro_batch(config: Config, machine: Machine) -> int | None:
    """With all else that the engine would choose; None if nothing fits."""
    try:
        there = choose(config, machine)
    except UserError:
        return None
    return there.config.train.micro_batch_size if there.memory.total <= there.machine.usable else None
