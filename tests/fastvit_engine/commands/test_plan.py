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
    assert said["images_per_second"] == pytest.approx(8 * 0.5 * 989e12 / 0.978e12, rel=0.002)
    assert said["days"] == pytest.approx(said["images"] / said["images_per_second"] / 86400)
    assert said["flops"] == pytest.approx(4262e18, rel=0.01)  # the paper's Table 6


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
    # The GPUs with 74 images set the pace.
    assert rows[1]["images_per_second"] / rows[0]["images_per_second"] == pytest.approx(64 / 74)
    text = plan(capsys, *arguments)
    (line,) = [line for line in text.splitlines() if line.startswith("      7     56  ")]
    assert "74 or 73" in line and f"{rows[1]['images_per_second']:,.0f}" in line
    split = plan(capsys, "vit_h14_jft", "--gpus", "56", "--set", "train.micro_batch_size=64")
    assert "4,096 images = 56 GPUs x 74 or 73 images, in 2 micro-batches of at most 37" in split


def test_a_number_of_nodes_that_cannot_hold_the_model_says_why(capsys):
    arguments = ["vit_h14_jft", "--gpus", "8", "--gpus-per-node", "1", "--gpu-memory", "7"]
    rows = json.loads(plan(capsys, *arguments, "--json"))["nodes"]
    assert "problem" not in rows[0] and rows[-1]["problem"].startswith("nothing fits")


def test_twice_the_gpus_take_half_the_time(capsys):
    days = [json.loads(plan(capsys, "vit_l16_jft", "--gpus", str(n), "--json"))["days"] for n in (8, 16)]
    assert days[0] == pytest.approx(2 * days[1])


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
