import json

import pytest

from fastvit_engine.cli import main


def plan(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_a_page_for_people(capsys):
    text = plan(capsys, "vit_h14_jft", "--gpus", "64", "--gpu", "H200")
    assert "64 x H200 in 8 nodes" in text
    assert [line.split()[0] for line in text.splitlines() if "fits" in line and "  " in line][:4] == [
        "0",
        "1",
        "2",
        "3",
    ]
    assert "fits, chosen" in text
    assert "4,096 images = 64 GPUs x 64 images x 1 micro-batch" in text
    assert "656 M parameters with a head for 18,291 classes and its hidden layer (head: mlp), bf16" in text
    assert "(together = weights + gradients + optimizer + buffers + max(update, activations + work))" in text
    assert "1,035,645 steps" in text and "an assumption" in text
    assert "has not been compared with a GPU's" in text


def test_one_of_each_is_singular(capsys):
    settings = ["train.duration=1 step", "schedule.warmup=0 steps", "train.global_batch_size=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    text = plan(capsys, "vit_b16_i1k", "--gpus", "1", *words)
    assert "1 image = 1 GPU x 1 image x 1 micro-batch\n" in text
    assert "length        1 step, 1 image, " in text


def test_json(capsys):
    said = json.loads(plan(capsys, "vit_h14_jft", "--gpus", "8", "--gpu-memory", "40", "--mfu", "0.5", "--json"))
    assert [stage["stage"] for stage in said["stages"]] == [0, 1, 2, 3]
    chosen = said["stages"][said["zero_stage"]]
    assert chosen["fits"] and chosen["memory"]["total"] <= said["gpu_memory_usable"]
    assert said["micro_batch_size"] * said["accumulation_steps"] * 8 == 4096
    assert said["deepspeed"]["zero_optimization"]["stage"] == said["zero_stage"]
    assert said["choices"][0]["reason"]
    # 8 H100 at half of 989 TFLOP/s, 1.004 TFLOP an image, of which 2.6 % are tokens that the head does not read
    assert 4096 / said["step"]["computing"] == pytest.approx(8 * 0.5 * 989e12 / 0.978e12, rel=0.002)
    assert said["images_per_second"] == pytest.approx(4096 / (said["step"]["computing"] + said["step"]["exposed"]))
    assert said["step"]["exposed"] > 0 and said["computing_is"] == "assumed" and said["assumed_mfu"] == 0.5
    assert said["days"] == pytest.approx(said["images"] / said["images_per_second"] / 86400)
    assert said["flops"] == pytest.approx(4262e18, rel=0.01)  # the paper's Table 6


def test_a_trial_is_planned_with_the_micro_batch_that_it_begins_with(capsys):
    computed, trial = (
        json.loads(plan(capsys, "vit_h14_jft", "--gpus", "8", "--json", "--set", f"train.micro_batch_trial={on}"))
        for on in ("false", "true")
    )
    assert trial["micro_batch_size"] == computed["micro_batch_size"]
    assert trial["stages"] == computed["stages"]


@pytest.mark.parametrize(
    "settings",
    [["train.micro_batch_size=512"], ["train.memory_gib=2.01"], ["zero.offload=optimizer", "train.memory_gib=3"]],
)
def test_the_largest_micro_batch_of_a_stage_is_the_one_that_is_chosen_there(capsys, settings):
    """Also where it fits because blocks are checkpointed or recomputed."""
    words = [word for setting in settings for word in ("--set", setting)]
    said = json.loads(plan(capsys, "vit_h14_jft", "--gpus", "8", *words, "--json"))
    chosen = next(row for row in said["stages"] if row["stage"] == said["zero_stage"])
    assert chosen["fits"] and chosen["largest_micro_batch"] == said["micro_batch_size"]


def test_in_fp32_the_peak_is_that_of_fp32(capsys):
    """1.004 TFLOP an image, of which 2.6 % are not computed, at 40 % of the datasheet's 67 TFLOP/s."""
    arguments = ("vit_h14_jft", "--gpus", "8", "--set", "train.precision=fp32")
    said = json.loads(plan(capsys, *arguments, "--json"))
    assert 4096 / said["step"]["computing"] == pytest.approx(8 * 0.4 * 67e12 / 0.978e12, rel=0.002)
    assert "if MFU is 40.0 % of 67 TFLOP/s in fp32 per GPU (an assumption)" in plan(capsys, *arguments)


def test_offloaded_activations_are_in_host_memory(capsys):
    settings = ["train.activation_checkpointing=all", "train.offload_activations=true", "train.micro_batch_size=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    text = plan(capsys, "vit_h14_jft", "--gpus", "8", *words)
    header, line = text.splitlines()[2:][1:3]
    assert text.splitlines()[2].startswith("GiB of each GPU at a micro-batch of 1 image (together")
    inputs = 32 * 257 * 1280 * 2 / 2**30  # of all blocks, in bf16
    assert float(line.split()[header.split().index("host")]) == pytest.approx(inputs, abs=0.05)
    assert "Copies of activations to host memory and back are not in these times." in text


POLICIES = [
    ["train.recompute=none", "train.activation_checkpointing=0"],
    ["train.recompute=gelu", "train.activation_checkpointing=0"],
    ["train.recompute=all", "train.activation_checkpointing=0"],
    ["train.activation_checkpointing=all"],
    ["train.activation_checkpointing=all", "train.offload_activations=true"],
]


def test_the_ways_to_keep_less_are_beside_each_other(capsys):
    """Each as it is planned by itself: memory, and the largest micro-batch."""
    arguments = ["vit_h14_jft", "--gpus", "8", "--gpu-memory", "24"]
    said = json.loads(plan(capsys, *arguments, "--json"))
    rows, at_stage = said["policies"], ["--set", f"zero.stage={said['zero_stage']}"]
    for row, policy in zip(rows, POLICIES, strict=True):
        words = [word for setting in policy for word in ("--set", setting)]
        size = ["--set", f"train.micro_batch_size={said['micro_batch_size']}"]
        alone = json.loads(plan(capsys, *arguments, *at_stage, *size, *words, "--json"))
        assert row["memory"]["total"] == alone["memory_estimate_bytes"]
        free = json.loads(plan(capsys, *arguments, *at_stage, *words, "--json"))
        assert row["largest_micro_batch"] == free["micro_batch_size"]
    kept = [row["memory"]["activations"] for row in rows]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 5
    assert [row["memory"]["host"] > 0 for row in rows] == [False] * 4 + [True]
    assert [row["computed_again"] for row in rows[:3]] == [0, 0, 0]
    assert rows[3]["computed_again"] == rows[4]["computed_again"] == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ([], "recompute=gelu "),
        (["train.activation_checkpointing=5"], "activation_checkpointing=5 "),
        (POLICIES[-1], "activation_checkpointing=all offload_activations=true "),
    ],
)
def test_the_chosen_way_is_marked(capsys, settings, chosen):
    words = [word for setting in settings for word in ("--set", setting)]
    text = plan(capsys, "vit_h14_jft", "--gpus", "8", *words)
    table = text.partition("by what blocks keep for the backward pass\n")[2].partition("\n\n")[0]
    (line,) = [line for line in table.splitlines() if "fits, chosen" in line]
    assert line.lstrip().startswith(chosen)


@pytest.mark.parametrize("setting", ["train.compile=true", "train.cuda_graph=true", "optimizer.frozen=backbone"])
def test_what_is_refused_beside_the_configuration_is_not_among_the_ways(capsys, setting):
    said = json.loads(plan(capsys, "vit_b16_i21k", "--gpus", "8", "--set", setting, "--json"))
    assert not any(row.get("activation_checkpointing") for row in said["policies"])


def test_every_number_of_nodes_has_a_line(capsys):
    arguments = ["vit_h14_jft", "--gpus", "64"]
    rows = json.loads(plan(capsys, *arguments, "--json"))["nodes"]
    assert [(row["nodes"], row["gpus"]) for row in rows] == [(n, 8 * n) for n in range(8, 0, -1)]
    shares = {row["gpus"]: (row["largest_share"], row["smallest_share"]) for row in rows}
    assert {gpus: shares[gpus] for gpus in (64, 56, 48, 40, 24)} == {
        64: (64, 64),
        56: (74, 73),
        48: (86, 85),
        40: (103, 102),
        24: (171, 170),
    }
    for row in rows:
        assert row["micro_batch_size"] * row["accumulation_steps"] >= row["largest_share"]
    # The GPUs with 74 images set the pace; what all send takes as long for 64.
    assert rows[1]["images_per_second"] / rows[0]["images_per_second"] == pytest.approx(64 / 74, rel=0.02)
    text = plan(capsys, *arguments)
    (line,) = [line for line in text.splitlines() if line.startswith("      7     56  ")]
    assert "74 or 73" in line and f"{rows[1]['images_per_second']:,.0f}" in line
    split = plan(capsys, "vit_h14_jft", "--gpus", "56", "--set", "train.micro_batch_size=64")
    assert "4,096 images = 56 GPUs x 74 or 73 images, in 2 micro-batches of at most 37" in split


def test_a_number_of_nodes_that_cannot_hold_the_model_says_why(capsys):
    arguments = ["vit_h14_jft", "--gpus", "8", "--gpus-per-node", "1", "--gpu-memory", "7"]
    rows = json.loads(plan(capsys, *arguments, "--json"))["nodes"]
    assert "problem" not in rows[0] and rows[-1]["problem"].startswith("nothing fits")


def test_twice_the_gpus_take_little_more_than_half_the_time(capsys):
    days = [json.loads(plan(capsys, "vit_l16_jft", "--gpus", str(n), "--json"))["days"] for n in (8, 16)]
    assert 1.9 * days[1] < days[0] < 2 * days[1]


def test_a_slow_network_costs_time_and_none_costs_nothing(capsys):
    def said(*options):
        return json.loads(plan(capsys, "vit_l16_jft", "--nodes", "4", "--json", *options))

    usual, slow = said(), said("--interconnect", "ethernet-10")
    assert slow["step"]["computing"] == usual["step"]["computing"]
    assert slow["step"]["exposed"] > 10 * usual["step"]["exposed"]
    fast = said("--bandwidth", "1e8", "1e8", "--latency", "0", "0")
    assert fast["images_per_second"] == pytest.approx(4096 / fast["step"]["computing"])
    assert fast["scaling"][-1]["efficiency"] == pytest.approx(1, rel=1e-4)
    efficiencies = [row["efficiency"] for row in slow["scaling"]]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[0] == pytest.approx(1)
    assert {row["is"] for row in slow["scaling"]} == {"modelled"}


def test_gpus_are_counted_in_nodes_or_all_together(capsys):
    by_nodes = json.loads(plan(capsys, "vit_l16_jft", "--nodes", "2", "--gpus-per-node", "4", "--json"))
    assert (by_nodes["gpus"], by_nodes["gpus_per_node"]) == (8, 4)
    both = json.loads(plan(capsys, "vit_l16_jft", "--nodes", "2", "--gpus", "8", "--json"))
    assert both == by_nodes
    whole = json.loads(plan(capsys, "vit_l16_jft", "--nodes", "1", "--json"))
    assert (whole["gpus"], whole["gpus_per_node"]) == (8, 8)


def test_processes_on_cpus(capsys):
    words = ["--gpu", "cpu", "--gpus", "2", "--gpus-per-node", "1", "--gpu-memory", "8", "--seconds-per-image", "0.02"]
    network = ["--bandwidth", "1", "0.025", "--latency", "50", "1000"]
    arguments = ["photos", *words, *network, "--set", "train.global_batch_size=32", "--set", "zero.stage=1"]
    said = json.loads(plan(capsys, *arguments, "--json"))
    assert said["step"]["computing"] == pytest.approx(0.02 * 16)
    assert said["gpu"] == "cpu" and said["assumed_mfu"] is None
    text = plan(capsys, *arguments)
    assert "on 2 processes in 2 nodes" in text and "0.32 s per step, if an image takes 0.02 s (given)" in text
    flops = said["computed_flops_per_image"]
    words[-2:] = ["--cpu-gflops", str(flops / 1e9 / 0.02)]
    again = json.loads(plan(capsys, "photos", *words, *network, *arguments[-4:], "--json"))
    assert again["images_per_second"] == pytest.approx(said["images_per_second"])


def result(**changes):
    """As `fastvit bench train` writes it."""
    flops, rate = 977.7e9, 300.0
    row = {"variant": "fastvit", "data": "memory", "status": "ok", "images_per_second": rate, "peak_flops": 989e12}
    row["mfu"] = rate * flops / row["peak_flops"]
    case = {"model": "H/14", "batch": 64, "precision": "bf16", "variants": [row | {"ours": True}]}
    return {"suite": "train", "environment": {"gpu": "NVIDIA H200"}, "cases": [case | changes]}


def test_a_measured_step_takes_the_place_of_the_assumption(capsys, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(result()))
    arguments = ["vit_h14_jft", "--gpus", "8", "--gpu", "H200", "--measured", str(tmp_path / "train.json")]
    said = json.loads(plan(capsys, *arguments, "--json"))
    assert 4096 / said["step"]["computing"] == pytest.approx(8 * 300)
    assert said["computing_is"] == "measured" and said["communicating_is"] == "modelled"
    assert [row["is"] for row in said["scaling"]] == ["measured"] + ["modelled"] * 9
    assert "as measured: fastvit, H/14 at a batch of 64, train.json" in plan(capsys, *arguments)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "no result of `fastvit bench train`"),
        (json.dumps(result() | {"environment": {"gpu": None}}), "measured on a CPU, and the plan is for H200"),
        (json.dumps(result() | {"environment": {"gpu": "NVIDIA A100"}}), "measured on NVIDIA A100"),
        (json.dumps(result(precision="fp32")), "has H/14 in fp32"),
        (json.dumps(result(variants=[])), "has no step of ours"),
        (json.dumps(result(variants=[{"variant": "fastvit", "data": "memory"}])), "lacks 'status'"),
    ],
)
def test_what_is_no_measurement_of_this_is_refused(capsys, tmp_path, content, part):
    (tmp_path / "train.json").write_text(content)
    arguments = ["--gpus", "8", "--gpu", "H200", "--measured", str(tmp_path / "train.json")]
    assert main(["plan", "vit_h14_jft", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_storage_cores_and_cost(capsys):
    arguments = ["vit_l16_jft", "--gpus", "16", "--price", "2.5"]
    said = json.loads(plan(capsys, *arguments, "--json"))
    assert said["gpu_hours"] == pytest.approx(16 * 24 * said["days"])
    assert said["cost"] == pytest.approx(2.5 * said["gpu_hours"])
    needs = said["needs"]
    weights = said["stages"][0]["memory"]["weights"] / 2  # which are bf16
    assert needs["checkpoint_bytes"] == pytest.approx(12 * weights)  # fp32, and two moments
    assert needs["read_bytes_per_second"] == pytest.approx(105_000 * said["images_per_second"])
    assert needs["decoding_cores"] == pytest.approx(said["images_per_second"] / 771)  # as the record has it
    averaged = json.loads(plan(capsys, *arguments, "--set", "ema.decay=0.999", "--json"))["needs"]
    assert averaged["checkpoint_bytes"] == pytest.approx(16 * weights)
    small = json.loads(plan(capsys, *arguments, "--sample-kb", "35", "--json"))
    assert small["needs"]["decoding_cores"] == pytest.approx(small["images_per_second"] / 1655)
    assert said["copies_bytes"] == 0  # on several machines, and on GPUs unless it is asked for
    on_one = ["vit_l16_jft", "--gpus", "8", "--set", "checkpoint.in_memory=true"]
    assert json.loads(plan(capsys, *on_one, "--json"))["copies_bytes"] == pytest.approx(2 * 12 * weights)
    assert "of host memory for two copies of the newest state, checkpoint.in_memory" in plan(capsys, *on_one)
    on_four = [
        "vit_l16_jft",
        "--gpus",
        "32",
        "--set",
        "checkpoint.in_memory=true",
    ]  # of each node, its own and a guest's
    assert json.loads(plan(capsys, *on_four, "--json"))["copies_bytes"] == pytest.approx(2 * 2 * 12 * weights / 4)
    assert "newest state per node, its own and that of the node before it" in plan(capsys, *on_four)
    text = plan(capsys, *arguments)
    assert f"{said['gpu_hours']:,.0f} GPU-hours: {said['cost']:,.0f} at 2.5 each" in text
    assert "105 kB per sample (photos as they are, assumed)" in text


def test_a_picture_of_more_gpus(capsys, tmp_path):
    text = plan(capsys, "vit_l16_jft", "--gpus", "8", "--out", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "scaling-dark.png", "scaling-dark.svg", "scaling.png", "scaling.svg",
    ]  # fmt: skip
    lines = text[text.index("by the number of GPUs") :].splitlines()[2:12]
    assert [int(line.split()[0]) for line in lines] == [2**power for power in range(10)]
    assert all(line.endswith("modelled") for line in lines)


def test_an_epoch_of_unknown_length(capsys):
    text = plan(capsys, "vit_b16_i1k", "--gpus", "8")
    assert "unknown" in text and "data.train_samples" in text
    assert "days" not in text
    text = plan(capsys, "vit_b16_i1k", "--gpus", "8", "--set", "data.subset=0.1")
    assert "an epoch is 0.1 of the samples, data.subset = 0.1" in text and "unknown" in text


def test_a_subset_takes_its_share_of_the_time(capsys):
    settings = ["vit_b16_i1k", "--gpus", "8", "--set", "data.train_samples=1281167", "--set", "schedule.warmup=5%"]
    whole, tenth = (json.loads(plan(capsys, *settings, *more, "--json")) for more in ([], ["--set=data.subset=0.1"]))
    assert (whole["samples_per_epoch"], tenth["samples_per_epoch"]) == (1_281_167, 128_117)
    assert whole["images"] == pytest.approx(10 * tenth["images"], rel=1e-3)
    text = plan(capsys, *settings, "--set", "data.subset=0.1")
    assert "data          an epoch is 128,117 samples, data.subset = 0.1\n" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "12", "--gpus-per-node", "8"], "does not divide --gpus 12"),
        (["--gpus", "8", "--mfu", "40"], "a share above 0 and up to 1"),
        (["--gpus", "8", "--gpu-memory", "1"], "too little"),
        (["--gpus", "1", "--gpu-memory", "8"], "nothing fits"),
        (["--gpus", "8", "--set", "train.global_batch_size=7"], "fewer images than the 8 processes"),
        ([], "Give --gpus, or --nodes"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--nodes", "3", "--gpus", "16"], "--gpus 16 are not --nodes 3"),
        (["--nodes", "2", "--gpus", "16", "--gpus-per-node", "4"], "with --gpus-per-node 4"),
        (["--gpus", "8", "--interconnect", "token-ring"], "nvlink4"),
        (["--gpus", "8", "--interconnect", "nvlink4+nvlink5"], "or both"),
        (["--gpus", "8", "--bandwidth", "400", "50"], "--bandwidth needs --latency"),
        (["--gpus", "8", "--latency", "2", "8"], "--latency needs --bandwidth"),
        (["--gpus", "8", "--bandwidth", "0", "50", "--latency", "2", "8"], "two positive figures"),
        (
            ["--gpus", "8", "--bandwidth", "9", "9", "--latency", "2", "8", "--interconnect", "nvlink4"],
            "say the same thing twice",
        ),
        (["--gpus", "8", "--price", "0"], "--price is 0"),
        (["--gpus", "8", "--seconds-per-image", "nan"], "--seconds-per-image is nan"),
        (["--gpus", "8", "--cpu-gflops", "100"], "--cpu-gflops is for --gpu cpu"),
        (["--gpus", "8", "--gpu", "cpu"], "no peak to assume"),
        (["--gpus", "8", "--gpu", "cpu", "--mfu", "0.4"], "a share of a GPU's peak"),
        (["--gpus", "8", "--gpu", "cpu", "--cpu-gflops", "50"], "no memory to assume"),
        (["--gpus", "8", "--gpu", "cpu", "--cpu-gflops", "50", "--gpu-memory", "4"], "no usual network"),
    ],
)
def test_bad_input(capsys, arguments, part):
    assert main(["plan", "vit_h14_jft", *arguments]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["", " ", "null", "~"])
@pytest.mark.parametrize("command", [["plan", "probe", "--gpus", "1"], ["config", "show", "probe"], ["train", "probe"]])
def test_an_empty_name_of_weights_is_not_a_start_from_scratch(capsys, command, empty):
    assert main([*command, "--init", empty]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"--init '{empty}' names no model: name one, or leave --init out" in captured.err
