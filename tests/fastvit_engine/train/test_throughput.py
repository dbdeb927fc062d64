"""The peak that MFU refers to, on a CPU."""

import multiprocessing
import os

import pytest
import torch

from fastvit_engine.train import throughput


def spin() -> None:
    while True:
        pass


def test_programs_that_want_the_same_core_do_not_lower_the_peak(lone_world) -> None:
    """Three of them leave this process a quarter of the core, and the product takes four times as long by the clock."""
    allowed = os.sched_getaffinity(0)
    others = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(3)]
    try:
        os.sched_setaffinity(0, {min(allowed)})
        alone = throughput.peak_flops(lone_world, "fp32")
        for other in others:
            other.start()
        starved = throughput.peak_flops(lone_world, "fp32")
    finally:
        for other in others:
            if other.pid:
                other.kill()
                other.join()
        os.sched_setaffinity(0, allowed)
    assert alone.flops / 2.5 < starved.flops < alone.flops * 2.5
    assert (
        starved.source == "measured: fastest fp32 product of 1024 x 1024 matrices, all processes at once, by CPU time"
    )


@pytest.mark.parametrize(("threads", "cores", "share"), [(1, 8.0, 1), (4, 8.0, 4), (8, 2.0, 2), (2, 1.5, 1.5)])
def test_the_peak_is_that_of_the_cores_that_a_process_has(lone_world, monkeypatch, threads, cores, share) -> None:
    """Of its threads, but not of more cores than it may use."""
    monkeypatch.setattr(throughput, "_core_seconds", lambda dtype: 0.5)
    monkeypatch.setattr(throughput, "core_share", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert throughput.peak_flops(lone_world, "bf16").flops == share * 2 * 1024**3 / 0.5
