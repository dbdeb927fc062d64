import json
from itertools import product

import pytest

from fastvit_engine.config import Config, load_config
from fastvit_engine.data.stream.batch_split import BatchSplit, split_batch
from fastvit_engine.engine.build import build_engine, deepspeed_config
from fastvit_engine.errors import UserError
from fastvit_engine.models import parameter_count
from fastvit_engine.sizing.candidates import candidate_at, possible_stages
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine, machine_here

GIB = 2**30


def gpus(count, gib=80.0, per_node=8):
    return Machine(count, min(count, per_node), int(gib * GIB), on_gpu=True)


def h14(*settings):
    return load_config("vit_h14_jft", settings).config


def reasons(chosen):
    return {choice.key: choice.reason for choice in chosen.choices}


def zero_settings(chosen):
    return deepspeed_config(chosen.config, split_batch(chosen.config, chosen.machine.processes))["zero_optimization"]


def test_what_fits_whole_is_not_sharded():
    chosen = choose(h14(), gpus(64))
    assert chosen.config.zero.stage == 0
    split = split_batch(chosen.config, 64)
    assert (split.micro_batch_size, split.accumulation_steps) == (64, 1)
    assert zero_settings(chosen) == {"stage": 0}
    assert "fits whole" in reasons(chosen)["zero.stage"]
    assert chosen.memory.total <= chosen.machine.usable


def test_accumulation_in_16_bits_is_left_to_fp32_sums():
    """Stage 0 would add bf16 gradients in bf16; in fp32 it has nothing against it."""
    bf16 = choose(h14(), gpus(8))
    assert (bf16.config.zero.stage, split_batch(bf16.config, 8).accumulation_steps) == (1, 2)
    assert "in fp32" in reasons(bf16)["zero.stage"]
    assert "only the last communicates" in reasons(bf16)["train.micro_batch_size"]
    fp32 = choose(h14("train.precision=fp32"), gpus(8))
    assert fp32.config.zero.stage == 0
    assert split_batch(fp32.config, 8).accumulation_steps > 1


def test_a_step_that_is_computed_at_once_is_never_cut():
    """What does not fit whole is refused, with how many GPUs would do."""
    recipe = load_config("moco_v3_s16").config
    for count in (8, 32):
        split = split_batch(choose(recipe, gpus(count)).config, count)
        assert (split.micro_batch_size, split.accumulation_steps) == (4096 // count, 1)
    with pytest.raises(UserError, match=r"nothing fits: .* micro-batch 4096\).*: \d+ GPUs would do"):
        choose(recipe, gpus(1, 24))


def test_less_memory_means_more_sharding():
    stages = [choose(h14(), gpus(64, gib)).config.zero.stage for gib in (80, 24, 16, 12, 7)]
    assert stages == sorted(stages)
    assert stages[0] == 0 and stages[-1] == 3


def test_a_stage_is_left_when_it_has_room_for_too_few_images():
    """8192 tokens are enough for the matrix products: a stage that fits fewer gives way to one that fits more."""
    gave_way = 0
    for gib in (9, 10, 11, 12, 13, 14, 16, 20):
        at_stages = [candidate_at(h14(f"zero.stage={stage}"), gpus(64, gib), stage) for stage in range(4)]
        micro_batches = {c.stage: c.micro_batch if c.fits else 0 for c in at_stages}
        chosen = choose(h14(), gpus(64, gib)).config
        assert chosen.train.micro_batch_size == micro_batches[chosen.zero.stage]
        if micro_batches[chosen.zero.stage] * 257 < 8192:
            assert micro_batches[chosen.zero.stage] == max(micro_batches.values())
        gave_way += 0 < micro_batches[1] * 257 < 8192 and chosen.zero.stage > 1
    assert gave_way > 0


@pytest.mark.parametrize("gib", [9, 16, 40, 80])
@pytest.mark.parametrize("count", [1, 8, 48, 512])
def test_what_is_chosen_fits_and_gives_the_same_global_batch(count, gib):
    config = load_config("vit_l16_jft", ["train.global_batch_size=12288"]).config
    chosen = choose(config, gpus(count, gib))
    split = split_batch(chosen.config, count)
    assert split.micro_batch_size * split.accumulation_steps * count == 12288
    assert chosen.memory.total <= chosen.machine.usable
    assert choose(config, gpus(count, gib)) == chosen  # nothing but its arguments decides


@pytest.mark.parametrize("gib", [20, 40, 80])
@pytest.mark.parametrize(
    ("count", "share"), [(56, "74 or 73"), (48, "86 or 85"), (40, "103 or 102"), (24, "171 or 170")]
)
def test_any_number_of_gpus_trains_the_global_batch(count, share, gib):
    chosen = choose(h14(), gpus(count, gib))
    split = split_batch(chosen.config, count)
    assert sum(sum(split.micro_batches(rank)) for rank in range(count)) == 4096
    assert split.micro_batch_size == chosen.config.train.micro_batch_size
    assert chosen.memory.total <= chosen.machine.usable
    assert reasons(chosen)["train.micro_batch_size"].endswith(f"; processes take {share} images per step")


def test_given_values_win_and_are_said_to_be_given():
    settings = [
        "zero.stage=2",
        "train.micro_batch_size=16",
        "deepspeed.zero_optimization.reduce_bucket_size=1000000",
        "deepspeed.zero_optimization.round_robin_gradients=true",
    ]
    chosen = choose(h14(*settings), gpus(64))
    by_user = {choice.key: choice.value for choice in chosen.choices if choice.by_user}
    assert by_user == {
        "zero.stage": 2,
        "train.micro_batch_size": 16,
        "deepspeed.zero_optimization.reduce_bucket_size": 1_000_000,
        "deepspeed.zero_optimization.round_robin_gradients": True,
    }
    written = zero_settings(chosen)
    assert written["reduce_bucket_size"] == 1_000_000 and written["round_robin_gradients"] is True
    assert written["contiguous_gradients"] is True and written["overlap_comm"] is True  # ours, beside them


def test_a_given_stage_that_does_not_fit_is_used_with_a_warning():
    chosen = choose(h14("zero.stage=0", "train.micro_batch_size=64"), gpus(64, 12))
    assert chosen.config.zero.stage == 0
    assert "although it needs" in reasons(chosen)["zero.stage"]


def test_buckets_follow_the_model_and_the_processes():
    small = zero_settings(choose(load_config("vit_b16_jft", ["zero.stage=2"]).config, gpus(8)))
    large = zero_settings(choose(load_config("vit_b16_jft", ["zero.stage=2"]).config, gpus(1024)))
    assert small["reduce_bucket_size"] < large["reduce_bucket_size"]
    assert large["reduce_bucket_size"] <= parameter_count(load_config("vit_b16_jft").config.model)
    alone = zero_settings(choose(load_config("vit_b16_jft", ["zero.stage=2"]).config, gpus(1)))
    assert alone["overlap_comm"] is False


def test_stage_3_lets_go_of_blocks_and_gathers_within_the_node():
    """DeepSpeed's own reuse distance of 1e9 parameters would keep all of H/14 gathered."""
    several = zero_settings(choose(h14("zero.stage=3"), gpus(64)))
    assert (
        several["stage3_max_reuse_distance"] < several["stage3_max_live_parameters"] < parameter_count(h14().model) / 4
    )
    assert several["zero_hpz_partition_size"] == 8
    assert "zero_hpz_partition_size" not in zero_settings(choose(h14("zero.stage=3"), gpus(8)))
    tight = choose(h14("zero.stage=3"), gpus(64))
    secondary = tight.memory.total
    assert (
        secondary
        > choose(h14("zero.stage=3", "deepspeed.zero_optimization.zero_hpz_partition_size=1"), gpus(64)).memory.total
    )


def test_offload_needs_sharding():
    assert choose(h14("zero.offload=optimizer"), gpus(64)).config.zero.stage == 1
    assert choose(h14("zero.offload=all"), gpus(64)).config.zero.stage == 3
    stages = {"none": [0, 1, 2, 3], "optimizer": [1, 2, 3], "all": [3]}
    for offload, possible in stages.items():
        assert sorted(possible_stages(h14(f"zero.offload={offload}"))) == possible


@pytest.mark.parametrize(("kind", "saved"), [("lion", 4), ("muon", 3.84), ("lamb", 0), ("adafactor", 5.98)])
def test_what_an_optimizer_saves_is_counted(kind, saved):
    def kept(kind):
        return choose(h14(f"optimizer.kind={kind}", "zero.stage=0"), gpus(8)).memory.optimizer

    assert (kept("adamw") - kept(kind)) / parameter_count(h14().model) == pytest.approx(saved, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "machine", "parts"),
    [
        (
            ["train.micro_batch_size=64", "train.activation_checkpointing=0"],
            gpus(64, 10),
            ["656 M parameters", "micro-batch 64", "train.micro_batch_size="],
        ),
        (["zero.stage=0"], gpus(64, 10), ["ZeRO stage 0", "zero.stage=1 would fit"]),
        ([], gpus(1, 12), ["ZeRO stage", "zero.offload=optimizer would fit"]),
        (["zero.offload=all"], gpus(2, 2), ["need at least", "GPU"]),
        (["zero.stage=0", "train.memory_gib=4"], gpus(64), ["4.0 GiB of train.memory_gib: train.memory_gib=1"]),
    ],
)
def test_what_cannot_fit_is_refused_with_the_nearest_remedy(settings, machine, parts):
    with pytest.raises(UserError) as refusal:
        choose(h14(*settings), machine)
    for part in ["nothing fits", *parts]:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.micro_batch_size=64", "train.activation_checkpointing=0"],
        [],
        ["zero.stage=0"],
        ["zero.stage=1"],
        ["zero.stage=3", "train.memory_gib=2"],
        ["train.compile=true"],
        ["train.compile=true", "zero.stage=1"],
        ["train.cuda_graph=true", "zero.stage=0"],
        ["optimizer.kernels=apex"],
        ["zero.offload=all"],
    ],
    ids=lambda settings: " ".join(settings) or "as it is",
)
def test_what_is_advised_fits(settings):
    advised = set()
    for count, gib in product((1, 8, 64), (1, 2, 3, 5, 8, 12, 16, 24)):
        machine = gpus(count, gib)
        try:
            choose(h14(*settings), machine)
        except UserError as refusal:
            remedy = str(refusal).rpartition(": ")[2]
            changes, fits, _ = remedy.partition(" would fit")
            if fits or "GPUs would do" in remedy:
                more = changes.split(" and ") if fits else []
                enough = machine if fits else gpus(int(remedy.split()[0]), gib)
                chosen = choose(h14(*settings, *more), enough)
                assert chosen.memory.total <= chosen.machine.usable, remedy
                advised.add(more[0].partition("=")[0] if more else "GPUs")
    assert advised


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (["zero.stage=0"], ["zero.offload=optimizer", "zero.stage=3"]),
        (["zero.stage=2"], ["zero.offload=optimizer", "zero.stage=3"]),
        (["zero.stage=3"], ["zero.offload=optimizer"]),
        ([], ["zero.offload=optimizer"]),
    ],
)
def test_offloading_that_is_advised_names_the_stage_that_it_needs(settings, advice):
    with pytest.raises(UserError, match=f": {' and '.join(advice)} would fit, with the rest in the host's memory"):
        choose(h14(*settings), gpus(8, 3))
    assert choose(h14(*settings, *advice), gpus(8, 3)).memory.total <= gpus(8, 3).usable


@pytest.mark.parametrize("setting", ["train.compile=true", "optimizer.kernels=apex", "train.cuda_graph=true"])
def test_offloading_is_not_advised_beside_what_refuses_it(setting):
    with pytest.raises(UserError, match="nothing fits") as refusal:
        choose(h14(setting), gpus(8, 3))
    assert "zero.offload=all" not in str(refusal.value)


def test_the_budget_that_is_advised_is_of_a_stage_that_is_taken():
    """Stage 0 needs the least on one GPU, and adds in bf16: an open stage is another one."""
    settings = ["train.micro_batch_size=64", "train.activation_checkpointing=all"]
    with pytest.raises(UserError, match=r"train\.memory_gib=\S+ would fit") as refusal:
        choose(h14(*settings, "train.memory_gib=1"), gpus(1))
    gib = str(refusal.value).partition(" would fit")[0].rpartition("=")[2]
    assert choose(h14(*settings, f"train.memory_gib={gib}"), gpus(1)).memory.total <= float(gib) * 2**30


def test_all_choices_are_made_for_the_budget():
    """As on a smaller GPU; and a budget of more than there is changes nothing."""
    roomy, smaller = gpus(64), gpus(64, 24)
    within = choose(h14(f"train.memory_gib={smaller.usable / 2**30}"), roomy)
    assert within.choices == choose(h14(), smaller).choices != choose(h14(), roomy).choices
    assert within.memory.total <= within.machine.usable == smaller.usable
    assert "GiB of train.memory_gib" in within.describe()
    assert choose(h14("train.memory_gib=1000"), roomy).describe() == choose(h14(), roomy).describe()
    with pytest.raises(UserError) as refusal:
        choose(h14("zero.stage=0", "train.memory_gib=1"), roomy)
    gib = str(refusal.value).partition(" would fit")[0].rpartition("=")[2]
    assert choose(h14("zero.stage=0", f"train.memory_gib={gib}"), roomy).memory.total <= float(gib) * 2**30


def test_an_open_stage_never_reaches_deepspeed():
    with pytest.raises(ValueError, match=r"zero\.stage is still open"):
        build_engine(None, Config(), BatchSplit(1, 1, 1), None)  # type: ignore[arg-type]


def test_this_machine_shares_its_memory_among_its_processes():
    one, four = machine_here(1), machine_here(4)
    assert not one.on_gpu  # the tests of this repository run without
    assert one.memory // 4 == four.memory
    assert 2**28 < one.memory < 2**46


def test_the_record_is_plain_json():
    record = json.loads(json.dumps(choose(h14(), gpus(8)).record()))
    keys = [choice["key"] for choice in record["choices"]]
    assert keys == ["zero.stage", "train.micro_batch_size", "train.recompute"]
    assert record["memory_estimate_bytes"] <= record["memory_usable_bytes"]


@pytest.mark.parametrize("mode", ["none", "gelu", "all"])
def test_blocks_recompute_as_little_as_memory_allows(mode):
    settings = ("zero.stage=1", "train.micro_batch_size=64")
    needs = choose(h14(*settings, f"train.recompute={mode}"), gpus(64)).memory.total
    just_enough = next(gib / 4 for gib in range(400) if gpus(64, gib / 4).usable >= needs)
    chosen = choose(h14(*settings), gpus(64, just_enough))
    assert chosen.config.train.recompute == mode
    assert chosen.memory.total == needs
    assert reasons(chosen)["train.recompute"] != "given"


def test_recompute_is_as_given_and_has_no_say_on_plain_pytorch():
    given = choose(h14("train.recompute=all"), gpus(64))
    assert given.config.train.recompute == "all" and reasons(given)["train.recompute"] == "given"
    kept = {mode: choose(h14(f"train.recompute={mode}", "train.micro_batch_size=32"), gpus(64)) for mode in MODES}
    activations = [kept[mode].memory.activations for mode in MODES]
    assert activations == sorted(activations, reverse=True) and len(set(activations)) == 3
    for settings, machine in (("model.dropout=0.1",), gpus(64)), ((), Machine(2, 2, 64 * GIB, on_gpu=False)):
        plain = choose(h14(*settings), machine)
        assert plain.config.train.recompute == "auto" and "train.recompute" not in reasons(plain)


MODES = ("none", "gelu", "all")


def test_as_few_blocks_are_checkpointed_as_the_memory_needs():
    """Where nothing fits without, and never where something does."""
    settings, key = ("zero.stage=1", "train.micro_batch_size=64"), "train.activation_checkpointing"
    for count in (1, 7, 20):
        needs = choose(h14(*settings, f"{key}={count}", "train.recompute=all"), gpus(64)).memory.total
        just_enough = next(gib / 4 for gib in range(400) if gpus(64, gib / 4).usable >= needs)
        chosen = choose(h14(*settings), gpus(64, just_enough))
        assert chosen.config.train.activation_checkpointing == count
        assert chosen.config.train.micro_batch_size == 64
        assert reasons(chosen)[key].startswith("of 32 blocks; with fewer, 64 images at a time do not fit into ")
        assert "train.micro_batch_size=" in reasons(chosen)[key]  # which would do without
    roomy = choose(h14(*settings), gpus(64))
    assert roomy.config.train.activation_checkpointing == 0 and key not in reasons(roomy)
    assert choose(h14(*settings, f"{key}=all"), gpus(64)).config.train.activation_checkpointing == 32
    assert reasons(choose(h14(*settings, f"{key}=0"), gpus(64)))[key] == "given"
    insisted = choose(h14("zero.stage=0", "train.micro_batch_size=64"), gpus(64, 4))
    assert insisted.config.train.activation_checkpointing == 32 and insisted.memory.total > insisted.machine.usable
    assert reasons(insisted)[key].startswith("of 32 blocks; even so, 64 images at a time do not fit into ")


def test_inputs_of_blocks_are_offloaded_from_gpus_alone():
    settings = ("train.activation_checkpointing=all", "train.offload_activations=true")
    chosen = choose(h14(*settings), gpus(64))
    assert reasons(chosen)["train.activation_checkpointing"] == "given, and their inputs wait in host memory"
    with pytest.raises(UserError, match="where those of a CPU are anyway: set train.offload_activations=false"):
        choose(h14(*settings), Machine(2, 2, 64 * GIB, on_gpu=False))


def test_micro_batches_are_tried_on_gpus_and_only_if_none_is_given():
    chosen = choose(h14("train.micro_batch_trial=true"), gpus(8))
    assert reasons(chosen)["train.micro_batch_size"].endswith("; the trial begins with it")
    assert chosen.config.train.micro_batch_size == choose(h14(), gpus(8)).config.train.micro_batch_size
    with pytest.raises(UserError, match="train.micro_batch_size = 64 says it: set train.micro_batch_size=null, or"):
        choose(h14("train.micro_batch_trial=true", "train.micro_batch_size=64"), gpus(8))
    with pytest.raises(UserError, match="would end the processes instead: set train.micro_batch_trial=false"):
        choose(h14("train.micro_batch_trial=true"), Machine(2, 2, 64 * GIB, on_gpu=False))


def test_passes_are_captured_on_gpus_with_whole_weights_and_nothing_is_checkpointed_for_them():
    chosen = choose(h14("train.cuda_graph=true"), gpus(64, 8))
    assert chosen.config.zero.stage == 2 and chosen.config.train.activation_checkpointing == 0
    assert "train.activation_checkpointing" not in reasons(chosen)
    with pytest.raises(UserError, match="needs a GPU: set train.cuda_graph=false"):
        choose(h14("train.cuda_graph=true"), Machine(2, 2, 64 * GIB, on_gpu=False))


def test_what_does_not_fit_for_its_graphs_would_without():
    settings, few = ("zero.stage=1", "train.cuda_graph=true"), gpus(64, 9)
    with pytest.raises(UserError, match=r"nothing fits: .*: train\.cuda_graph=false would fit"):
        choose(h14(*settings), few)
    assert choose(h14(*settings, "train.cuda_graph=false"), few).memory.total <= few.usable
    with pytest.raises(UserError, match="take a smaller model") as refused:
        choose(h14(*settings), gpus(64, 5))
    assert "offload" not in str(refused.value)  # which captured passes refuse


@pytest.mark.parametrize(
    ("on_gpu", "cores", "workers"),
    [
        (True, 16, 15),
        (True, 64, 16),
        (True, 1, 1),
        (True, 0, 1),
        (False, 1, 1),
        (False, 0, 1),
        (False, 3, 3),
        (False, 64, 4),
    ],
)
def test_decoding_processes_follow_the_cores_of_each_process(on_gpu, cores, workers):
    machine = Machine(2, 2, 80 * 2**30, on_gpu, cores)
    chosen = choose(Config(), machine)
    assert chosen.config.data.num_workers == workers
    assert f"data.num_workers = {workers}: " in chosen.describe()
    given = Config.model_validate({"data": {"num_workers": 7}})
    assert choose(given, machine).config.data.num_workers == 7
    streams = Config.model_validate({"data": {"order": "stream"}})
    assert choose(streams, machine).config.data.num_workers == 4  # a resumed run finds its order on any machine


def test_where_cores_are_not_known_nothing_is_said_of_them():
    chosen = choose(Config(), Machine(2, 2, 80 * 2**30, on_gpu=True))
    assert chosen.config.data.num_workers is None and "num_workers" not in chosen.describe()


def test_a_budget_of_tokens_says_the_micro_batch():
    settings = ["model.dropout=0", "packing.max_patches=200", "packing.token_budget=6500"]  # 201 tokens each
    chosen = choose(load_config("vit_h14_jft", settings).config, gpus(64))
    assert chosen.config.train.micro_batch_size == 32 and chosen.config.packing.token_budget is None
    assert reasons(chosen)["train.micro_batch_size"] == "as many as fit into packing.token_budget = 6,500"
    other = choose(load_config("vit_h14_jft", [*settings[:2], "packing.token_budget=6000"]).config, gpus(64))
    assert other.config.train.micro_batch_size == 16
    expected = "the largest divisor of 64 that does not exceed your 29 images of packing.token_budget = 6,000"
    assert reasons(other)["train.micro_batch_size"] == expected
