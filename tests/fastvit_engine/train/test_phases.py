"""Which steps see which images, and what they cost."""

import pytest

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.duration import BatchSizes
from fastvit_engine.errors import UserError
from fastvit_engine.models import run_flops
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.step_time import usual_speed
from fastvit_engine.train.compute import Compute
from fastvit_engine.train.estimate import describe_time, training_time
from fastvit_engine.train.phases import phases_of
from fastvit_engine.train.schedule import Schedule

MODEL = {"name": "Ti/4", "image_size": 32, "num_classes": 10}


def make(duration="100 steps", model=MODEL, **tokens) -> Config:
    train = {"duration": duration, "global_batch_size": 10}
    return Config.model_validate({"model": model, "train": train, "tokens": tokens, "schedule": {"warmup": "0 steps"}})


def test_a_run_without_them_has_one_phase():
    assert Schedule(make(), None).phases.phases == (Phase(0, 32, 0.0),)


def test_sizes_and_dropped_patches_have_points_of_their_own():
    config = make(patch_drop=0.5, patch_drop_until="80%", image_sizes=[[16, "50 steps"], [24, "600 samples"]])
    phases = Schedule(config, None).phases
    assert phases.phases == (Phase(0, 16, 0.5), Phase(50, 24, 0.5), Phase(60, 32, 0.5), Phase(80, 32, 0.0))
    assert [phases.at(step).image_size for step in (0, 49, 50, 59, 60, 99)] == [16, 16, 24, 24, 32, 32]
    assert phases.spans(55, 81) == [(phases.phases[1], 5), (phases.phases[2], 20), (phases.phases[3], 1)]
    assert [phases.image_sizes_from(48)(number) for number in range(3)] == [16, 16, 24]


def test_dropping_to_the_end_has_no_other_phase():
    assert Schedule(make(patch_drop=0.5, patch_drop_until="100%"), None).phases.phases == (Phase(0, 32, 0.5),)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"image_sizes": [[16, "3 epochs"]]}, r"has the point '3 epochs', which is step 150, after the end"),
        ({"image_sizes": [[16, "2 epochs"]]}, r"leaves no step of the 100 to images of model\.image_size"),
        ({"image_sizes": [[16, "1 epoch"], [24, "40 steps"]]}, "ends the images of 24 pixels before smaller ones"),
        ({"patch_drop": 0.5, "patch_drop_until": "3 epochs"}, r"tokens\.patch_drop_until has the point '3 epochs'"),
    ],
)
def test_points_that_only_the_data_can_judge(tokens, message):
    with pytest.raises(UserError, match=message):
        Schedule(make(**tokens), 500)


def test_a_change_of_the_batch_keeps_the_samples_of_a_phase():
    """40 steps of 10 images and then steps of 20: half of the 1000 images are seen after 5 of these."""
    config = make("1000 samples", image_sizes=[[16, "50%"]])
    sizes = BatchSizes(((0, 10), (40, 20)))
    assert [phase.first_step for phase in phases_of(config, 70, None, sizes).phases] == [0, 45]
    assert [phase.first_step for phase in phases_of(config, 100, None, BatchSizes.always(10)).phases] == [0, 50]


def test_the_operations_of_a_run_are_those_of_its_steps():
    config = make(patch_drop=0.5, patch_drop_until="80%", image_sizes=[[16, "50%"]])
    phases, compute = Schedule(config, None).phases, Compute(config)
    whole = compute.of_steps(phases, 0, 100)
    one_by_one = [compute.of_steps(phases, step, step + 1) for step in range(100)]
    assert whole.computed == sum(flops.computed for flops in one_by_one)
    small, middle, large = (run_flops(config, phase).computed for phase in phases.phases)
    assert whole.computed == 10 * (50 * small + 30 * middle + 20 * large)
    assert small < middle < large == run_flops(config).computed
    assert compute.mean_per_image(phases, 100).computed == round(whole.computed / 1000)


def test_what_a_subset_computes_is_counted_by_the_micro_batches():
    model = MODEL | {"drop_path": 0.5, "drop_path_mode": "subset", "depth": 2, "pool": "gap"}
    config = make(model=model)
    phase = Phase(0, 32, 0.0)
    halves, one = (Compute(config, BatchSplit(10, *of)).per_image(phase).computed for of in ((1, 1), (10, 1)))
    masked = run_flops(make(model=model | {"drop_path_mode": "mask"}))
    assert one == masked.computed  # of one image none is dropped
    assert run_flops(config).whole == masked.whole and halves == run_flops(config).computed < masked.computed


def test_a_plan_says_what_each_phase_costs():
    config = make(patch_drop=0.5, patch_drop_until="80%", image_sizes=[[16, "50%"]])
    chosen, whole = (choose(of, Machine(1, 1, 2**36, on_gpu=True)) for of in (config, make()))
    speed = usual_speed(chosen.config, "H100", 0.4)
    time, plain = (training_time(of, speed, None) for of in (chosen, whole))
    assert [phase["steps"] for phase in time["phases"]] == [50, 30, 20]
    share = time["computed_flops_per_image"] / plain["computed_flops_per_image"]
    assert time["days"] == pytest.approx(share * plain["days"]) and 0.2 < share < 0.6
    lines = describe_time(time, speed, chosen)
    assert "per image, on average" in lines[0]
    assert lines[1].startswith("phases        steps 1 to 50: images of 16 px, 50 % of the patches dropped, ")
    assert lines[3].startswith("              steps 81 to 100: images of 32 px, ") and lines[-1].startswith("time ")


def test_memory_is_that_of_the_largest_phase():
    machine = Machine(1, 1, 2**36, on_gpu=True)
    plain, tail, dropped = (
        choose(make(**tokens), machine).memory.activations
        for tokens in (
            {},
            {"patch_drop": 0.5, "image_sizes": [[16, "50%"]]},
            {"patch_drop": 0.5, "patch_drop_until": "100%"},
        )
    )
    assert tail == plain and 0.45 * plain < dropped < 0.6 * plain
