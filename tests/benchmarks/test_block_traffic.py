import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks import block_traffic, step_model
from benchmarks.block_traffic import ATTENTION, ELEMENTWISE, PRODUCTS, SETTINGS, Record, main, totals, trace
from benchmarks.launches import KERNELS
from benchmarks.shapes import GPU_SHAPES
from tests.benchmarks.conftest import TINY

H14 = GPU_SHAPES[0]


def test_a_block_of_the_large_model_moves_and_multiplies_what_arithmetic_says() -> None:
    runs = [kind.run for kind in KERNELS]
    launches = trace(H14, 256, SETTINGS["bf16"])
    assert [kind.run for kind in KERNELS] == runs and not torch.is_autocast_enabled("cuda")
    total, tokens, width = totals(launches), 256 * 257, 1280
    assert (
        total["launches"]
        == len(launches)
        == sum(total[kind]["launches"] for kind in (PRODUCTS, ATTENTION, ELEMENTWISE))
    )
    # qkv, projection and both layers of the MLP: [D, 3 D], [D, D], [D, 4 D], [4 D, D], three products each
    assert total[PRODUCTS]["flops"] == 3 * 2 * tokens * width * 12 * width and total[PRODUCTS]["launches"] == 12
    assert total[ATTENTION]["flops"] == 9 * 2 * 256 * 16 * 257**2 * 80
    first = next(launch for launch in launches if launch.kind == PRODUCTS)
    weights = 3 * width * width + 3 * width
    assert first.bytes == 2 * (tokens * width + weights + tokens * 3 * width)  # input, qkv and its bias, output
    assert first.microseconds == pytest.approx(1e6 * first.flops / block_traffic.PRODUCT_FLOPS)
    moved = next(launch for launch in launches if launch.kind == ELEMENTWISE)
    assert moved.name.startswith("layer_norm") and moved.microseconds == 1e6 * moved.bytes / 4.3e12
    assert total["ms"] <= 12.31  # what two half-blocks take


def test_the_last_block_multiplies_keys_and_values_of_all_tokens_and_the_rest_of_one() -> None:
    for name in ("bf16", "autocast"):
        total, tokens, width = totals(trace(H14, 256, SETTINGS[name], outputs=1)), 256 * 257, 1280
        assert total[PRODUCTS]["flops"] == 3 * 2 * (tokens * 2 + 256 * 10) * width**2
        assert total[ATTENTION]["flops"] == 9 * 2 * 256 * 16 * 257 * 80 and total[ATTENTION]["launches"] == 3


def test_quack_takes_the_passes_over_the_hidden_layer() -> None:
    hidden, width = 256 * 257 * 5120 * 2, 1280  # bytes
    plain, fused, apart = (totals(trace(H14, 256, SETTINGS[name])) for name in
                           ("bf16", "bf16, QuACK", "bf16, QuACK, sums apart"))  # fmt: skip
    assert fused["quack"]["launches"] == 2 and fused["quack"]["flops"] == 2 * 2 * 256 * 257 * width * 5120
    assert fused[PRODUCTS]["flops"] == plain[PRODUCTS]["flops"] and plain["quack"]["launches"] == 0
    assert fused["launches"] == 21 and fused["ms"] < 11.2 and apart["launches"] == 22 and apart["ms"] < 11.3
    # GELU reads and writes one matrix, GELU' reads two and writes two, of which one remains apart
    sums = -(-256 * 257 // 128) * 5120 * 4
    saved = plain[ELEMENTWISE]["bytes"] - fused[ELEMENTWISE]["bytes"]
    assert saved == pytest.approx(6 * hidden - sums, rel=0.005)
    assert apart[ELEMENTWISE]["bytes"] - fused[ELEMENTWISE]["bytes"] == pytest.approx(hidden, rel=0.02)
    # in their place, the epilogues write two matrices more, and read one
    assert fused[PRODUCTS]["bytes"] - plain[PRODUCTS]["bytes"] == pytest.approx(3 * hidden + sums, rel=0.001)


def test_a_step_charges_what_quack_takes_longer() -> None:
    block = totals(trace(H14, 256, SETTINGS["bf16, QuACK"]))
    blocks = {"with": {"totals": block}, "without": {"totals": {k: v for k, v in block.items() if k != "quack"}}}
    steps = step_model.ours({"model": "H/14", "batch": 256, "blocks": blocks}, 44, "overlapped", "bf16")
    with_it, without = (next(s.products for s in steps if s.name == f"fastvit, ZeRO-1, {n}") for n in blocks)
    lost = step_model.QUACK_LOSS * 32 * block["quack"]["flops"] / step_model.PRODUCT_FLOPS
    assert with_it - without == pytest.approx(1e3 * lost) and lost > 0.003


def test_a_step_normalises_the_class_token_alone_if_the_last_block_is_for_it_alone() -> None:
    block = totals(trace(H14, 256, SETTINGS["bf16"]))
    blocks = {"all": {"totals": block}, "one": {"totals": block, "last": block}}
    steps = step_model.ours({"model": "H/14", "batch": 256, "blocks": blocks}, 44, "overlapped", "bf16")
    every, one = (next(step.ends for step in steps if step.name == f"fastvit, ZeRO-1, {n}") for n in blocks)
    assert every - one == pytest.approx(1e3 * 6 * 256 * 257 * 1280 * 2 / step_model.BYTES_PER_SECOND)


def test_casts_under_autocast_are_launches() -> None:
    plain, autocast = (trace(TINY, 2, SETTINGS[name]) for name in ("bf16", "autocast"))
    assert totals(plain)[PRODUCTS]["flops"] == totals(autocast)[PRODUCTS]["flops"]
    assert totals(plain)["bytes"] < totals(autocast)["bytes"]
    qkv = next(launch for launch in autocast if launch.name == "to_copy")
    assert qkv.bytes == (4 + 2) * 3 * TINY.width**2  # float32 read, bf16 written
    assert all(launch.name != "to_copy" for launch in plain)


def test_a_kernel_that_multiplies_in_an_unknown_way_is_refused() -> None:
    kernel = JITFunction(attention_of_tomorrow_kernel)
    with pytest.raises(ValueError, match="how much attention_of_tomorrow_kernel multiplies is not known"):
        Record(1).kernel(kernel, torch.empty(2, device="meta"), grid=(1,), warmup=False)


def test_tensors_in_tuples_and_descriptors_are_counted() -> None:
    record, tensor = Record(1), torch.empty(10, dtype=torch.float32, device="meta")
    described = SimpleNamespace(base=tensor)
    record.kernel(JITFunction(sum_kernel), ((tensor, (tensor, 3)),), described, None, grid=(1,), warmup=False, SIZE=2)
    assert [launch.bytes for launch in record.launches] == [3 * 40]


def attention_of_tomorrow_kernel(q_ptr):
    pass


def sum_kernel(stacks, x_ptr, y_ptr, SIZE):
    pass


@pytest.mark.parametrize(
    ("blocks", "steps", "options"),
    [
        ("blocks", "steps", []),
        ("blocks-before", "steps-before", ["--attention", "serialised", "--patch-embed", "fp32"]),
    ],
)
def test_the_committed_steps_are_what_the_model_gives(
    blocks: str, steps: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, committed = tmp_path / "steps.json", step_model.RESULTS / f"{steps}.json"
    assert step_model.main(["--trace", str(step_model.RESULTS / f"{blocks}.json"), *options, "--out", str(out)]) == 0
    assert out.with_suffix(".txt").read_text() == capsys.readouterr().out == committed.with_suffix(".txt").read_text()
    found, wanted = (json.loads(path.read_text()) for path in (out, committed))
    assert found["steps"] == wanted["steps"] and found["deepspeed_bytes"] == wanted["deepspeed_bytes"]
    rows = {row["name"]: row for row in found["steps"]}
    # by hand: AdamW moves 28 bytes per parameter, DeepSpeed 44 besides; a bare loop that clips, 12
    for name, size in (("ZeRO-1, bf16", 72), ("bare loop, autocast", 40)):
        assert rows[f"fastvit, {name}"]["optimizer"] == pytest.approx(632_045_800 * size / (0.85 * 4.3e9), rel=1e-3)
    assert step_model.flops_per_image() == pytest.approx((1.004e12, 0.978e12), rel=1e-3)


def test_the_commands_write_what_the_other_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    blocks, picture = tmp_path / "blocks.json", tmp_path / "new" / "step.png"
    assert main(["--settings", "bf16", "--out", str(blocks)]) == 0
    assert blocks.with_suffix(".txt").read_text() == capsys.readouterr().out
    assert step_model.main(["--trace", str(blocks), "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    assert main(["--batch", "8", "--settings", "bf16", "--out", str(blocks)]) == 0
    assert step_model.main(["--trace", str(blocks)]) == 2
    assert "the trace is of H/14 at batch 8, and this model is of H/14 at batch 256" in capsys.readouterr().err


def test_what_the_commands_cannot_read_or_write_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (main, step_model.main):
        with pytest.raises(SystemExit):
            command(["--out", str(tmp_path / "blocks.txt")])
        assert "blocks.txt must end in .json: the text is written beside it" in capsys.readouterr().err
    for text in ("[]", '{"model": "H/14", "batch": 256, "blocks": {}}'):
        (tmp_path / "blocks.json").write_text(text)
        assert step_model.main(["--trace", str(tmp_path / "blocks.json")]) == 2
        assert capsys.readouterr().err.startswith("--trace ")
    (tmp_path / "deepspeed.json").write_text('{"cases": []}')
    assert step_model.main(["--deepspeed", str(tmp_path / "deepspeed.json")]) == 2
    assert "deepspeed.json: ValueError: it has no case ZeRO-1 bf16: write it again by" in capsys.readouterr().err
