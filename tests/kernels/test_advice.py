"""Advice of error sentences: what they name exists, and a call that is corrected as they say gives the right result."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit_kernels
from fastvit_kernels import dispatch, table
from fastvit_kernels.attention.tiling import Tiling, forward_tiling
from fastvit_kernels.attention_block.op import attention_block
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.table import Entry, Provenance, Table
from fastvit_kernels.tuning import __main__ as tool

PACKAGE = Path(fastvit_kernels.__file__).parent
GAP = "\0"  # in place of what is only known when the sentence is made


def _sentences() -> Iterator[tuple[str, int, str]]:
    """(file, line, text) of every literal text with a space that is no docstring; f-strings have GAP for each value."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(value) for value in node.values}
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                text = node.value
            else:
                continue
            if " " in text.strip():
                yield str(path.relative_to(PACKAGE)), node.lineno, text


SENTENCES = list(_sentences())


def test_variables_that_sentences_name_are_read() -> None:
    read = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text())
    }
    named = {name for _, _, text in SENTENCES for name in re.findall(r"\b(?:FASTVIT|TRITON)_[A-Z_]+\b", text)}
    assert {"FASTVIT_KERNELS", "FASTVIT_TUNING", "TRITON_INTERPRET"} <= named <= read


def test_commands_that_sentences_name_exist_with_their_options() -> None:
    commands = {name for _, _, text in SENTENCES for name in re.findall(r"python -m ([\w.]+)", text)}
    assert {"fastvit_kernels.tuning", "fastvit_kernels.tuning.codegen"} <= commands
    for name in commands:
        module = importlib.util.find_spec(name)
        assert module is not None
        assert module.submodule_search_locations is None or importlib.util.find_spec(f"{name}.__main__") is not None
    source = (PACKAGE / "tuning" / "__main__.py").read_text()
    options = set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", source))
    named = {name for path, _, text in SENTENCES if path.startswith("tuning/__main__") for name in
             re.findall(r"(?<!\S)--[a-z-]+", text)}  # fmt: skip
    assert {"--out", "--dry-run"} <= named <= options


# ---- which implementation runs


def _run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVIT_", "TRITON_"))}
    command = [sys.executable, *(["-m", *program.split()[1:]] if program.startswith("-m ") else ["-c", program])]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
def test_kernels_on_the_cpu_run_with_the_variable_that_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import torch; from fastvit_kernels import layer_norm;"
        "x = torch.arange(12.0).view(3, 4); y = layer_norm(x, torch.ones(4), torch.zeros(4));"
        "torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (4,), eps=1e-6)); print('equal')"
    )
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with dispatch.using("triton"), pytest.raises(RuntimeError) as refused:
        fastvit_kernels.layer_norm(torch.zeros(3, 4), torch.ones(4), torch.zeros(4))
    advised = re.search(r"unless (TRITON_INTERPRET)=(1) is set before Python starts", str(refused.value))
    assert advised
    followed = _run(program, FASTVIT_KERNELS="triton", CUDA_VISIBLE_DEVICES="", **{advised[1]: advised[2]})
    assert followed.stdout == "equal\n", followed.stderr


# ---- calls


def _norm() -> tuple[Tensor, Tensor]:
    return torch.ones(8), torch.zeros(8)


@cache
def _qkv(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 6, 3, 2, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def _expected_attention(bias: Tensor | None = None) -> Tensor:
    q, k, v = _qkv().permute(2, 0, 3, 1, 4)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(-2)


LENGTHS = torch.tensor([0, 6], dtype=torch.int32)
LOGITS = torch.linspace(-1, 1, 12).view(3, 4)
LABELS = torch.tensor([0, 3, 1])
SOFT = nn.functional.one_hot(LABELS, 4).float()
LAM = torch.tensor([0.3, 0.6, 1.0])
IMAGES = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
PATCH, PATCH_BIAS = torch.linspace(-1, 1, 5 * 3 * 2 * 2).view(5, 3, 2, 2), torch.zeros(5)
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _cross_entropy(target: Tensor = LABELS) -> Tensor:
    return nn.functional.cross_entropy(LOGITS, target)


def _patches(kept: slice = slice(None)) -> Tensor:
    pixels = (IMAGES.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    return nn.functional.conv2d(pixels, PATCH, PATCH_BIAS, stride=2).flatten(2).transpose(1, 2)[:, kept]


def _attend(**options: Any) -> Tensor:
    return fastvit_kernels.attention(_qkv(), **options)


def _attend_packed(qkv: Tensor, **options: Any) -> Tensor:
    return fastvit_kernels.attention(qkv, **options)[None]


def _lose(labels: Tensor = LABELS, **options: Any) -> Tensor:
    return fastvit_kernels.cross_entropy(LOGITS, labels, **options)


def _cut(images: Tensor = IMAGES, weight: Tensor = PATCH, **options: Any) -> Tensor:
    return fastvit_kernels.patch_embed(images, weight, PATCH_BIAS, **{**HALF, **options})


@pytest.mark.parametrize(
    ("call", "refused", "advice", "followed", "expected"),
    [
        (_attend_packed, {"qkv": _qkv()[0]}, r"must have shape \[B, N, 3, H, d\]", {"qkv": _qkv()},
         lambda: _expected_attention()[None]),
        (_attend_packed, {"qkv": _qkv(), "cu_seqlens": LENGTHS, "max_seqlen": 6}, r"\[T, 3, H, d\] with cu_seqlens",
         {"qkv": _qkv()[0], "cu_seqlens": LENGTHS, "max_seqlen": 6}, _expected_attention),
        (_attend_packed, {"qkv": _qkv()[0], "cu_seqlens": LENGTHS}, "must be given together",
         {"qkv": _qkv()[0], "cu_seqlens": LENGTHS, "max_seqlen": 6}, _expected_attention),
        (_attend_packed, {"qkv": _qkv()[0], "cu_seqlens": LENGTHS.long(), "max_seqlen": 6}, r"must be torch\.int32",
         {"qkv": _qkv()[0], "cu_seqlens": LENGTHS.long().to(torch.int32), "max_seqlen": 6}, _expected_attention),
        (_attend, {"bias": torch.ones(5, 5)}, r"broadcastable to \[B, H, N, M\] = \[1, 2, 6, 6\]",
         {"bias": torch.ones(1, 2, 6, 6)}, lambda: _expected_attention(torch.ones(1, 2, 6, 6))),
        (_attend, {"bias": torch.ones(6, 6).half()}, r"or torch\.float32", {"bias": torch.ones(6, 6)},
         lambda: _expected_attention(torch.ones(6, 6))),
        (_attend, {"dropout": 1.0}, "at least 0 and below 1", {"dropout": 0.0}, _expected_attention),
        (_lose, {"labels": LABELS.int()}, "int64 class indices or floating soft labels", {"labels": LABELS},
         _cross_entropy),
        (_lose, {"labels": SOFT.int()}, "int64 class indices or floating soft labels", {"labels": SOFT},
         _cross_entropy),
        (_lose, {"labels": SOFT[:, :3]}, r"must have shape \[3, 4\]", {"labels": SOFT}, _cross_entropy),
        (_lose, {"labels": LABELS + 1}, r"must lie in 0\.\.3", {"labels": LABELS}, _cross_entropy),
        (_lose, {"labels_b": LABELS}, "labels_b and mix_weight must be given together",
         {"labels_b": LABELS, "mix_weight": LAM}, _cross_entropy),
        (_lose, {"labels_b": SOFT, "mix_weight": LAM}, "must both be class indices or both be soft labels",
         {"labels": SOFT, "labels_b": SOFT, "mix_weight": LAM}, _cross_entropy),
        (_lose, {"labels_b": LABELS, "mix_weight": LAM[0]}, r"mix_weight must have shape \[3\]",
         {"labels_b": LABELS, "mix_weight": LAM}, _cross_entropy),
        (_lose, {"reduction": "sum"}, "must be 'mean' or 'none'", {"reduction": "mean"}, _cross_entropy),
        (_lose, {"z_loss": -1.0}, "at least 0", {"z_loss": 0.0}, _cross_entropy),
        (_cut, {"images": IMAGES[..., :1]}, r"\[B, H, W, 3\] or \[B, 3, H, W\]",
         {"images": IMAGES.permute(0, 3, 1, 2).contiguous()}, _patches),
        (_cut, {"images": IMAGES.float()}, r"\[B, 3, H, W\] when floating point",
         {"images": (IMAGES.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5}, _patches),
        (_cut, {"images": IMAGES[:, :, :3]}, "cannot be cut into patches of 2 x 2", {"images": IMAGES}, _patches),
        (_cut, {"weight": PATCH[:, :1]}, r"\[D, 3, P, P\]", {"weight": PATCH}, _patches),
        (_cut, {"mean": (0.5,)}, "one number for each of 3 channels", {"mean": (0.5, 0.5, 0.5)}, _patches),
        (_cut, {"keep_indices": torch.zeros(2, 1, dtype=torch.int32)}, "must be int64",
         {"keep_indices": torch.zeros(2, 1, dtype=torch.int64)}, lambda: _patches(slice(1))),
        (_cut, {"keep_indices": torch.zeros(2, dtype=torch.int64)}, r"must have shape \[2, K\]",
         {"keep_indices": torch.zeros(2, 1, dtype=torch.int64)}, lambda: _patches(slice(1))),
        (_cut, {"keep_indices": torch.full((2, 1), 4)}, r"must lie in 0\.\.3", {"keep_indices": torch.full((2, 1), 3)},
         lambda: _patches(slice(3, 4))),
        (_cut, {"keep_indices": torch.zeros(2, 2, dtype=torch.int64)}, "name each patch of an image once",
         {"keep_indices": torch.tensor([[0, 1], [0, 1]])}, lambda: _patches(slice(2))),
    ],
)  # fmt: skip
def test_a_call_that_is_corrected_as_advised_is_right(
    call: Callable[..., Tensor], refused: Any, advice: str, followed: Any, expected: Callable[[], Tensor]
) -> None:
    with dispatch.using("reference"):
        with pytest.raises((ValueError, TypeError), match=advice):
            call(**refused)
        result = call(**followed)
        torch.testing.assert_close(result, expected().view_as(result))


def _choices(error: BaseException) -> list[str]:
    named = re.search(r"must be one of (.+), got", str(error))
    assert named is not None
    return named[1].split(", ")


def _block(**options: Any) -> Tensor:
    torch.manual_seed(0)
    return fastvit_kernels.FusedBlock(8, 2, 16, **options)(torch.randn(2, 3, 8))


def _half_block(recompute: Any) -> Tensor:
    torch.manual_seed(0)
    weights = [torch.randn(24, 8), torch.zeros(24), torch.randn(8, 8), torch.zeros(8)]
    return attention_block(torch.randn(2, 3, 8), *_norm(), *weights, heads=2, eps=1e-6, recompute=recompute)


@pytest.mark.parametrize(
    ("call", "name"),
    [(_block, "activation"), (_block, "recompute"), (_block, "drop_path_mode"), (_half_block, "recompute"),
     (fastvit_kernels.FusedCrossEntropy, "kind"), (dispatch.using, "implementation")],
)  # fmt: skip
def test_each_choice_that_a_sentence_lists_is_taken(call: Callable[..., Any], name: str) -> None:
    with dispatch.using("reference"), pytest.raises(ValueError, match="must be one of") as refused:
        made = call(**{name: "other"})
        if call is dispatch.using:
            made.__enter__()
    choices = _choices(refused.value)
    assert len(choices) >= 2
    for choice in choices:
        with dispatch.using("reference"):
            result = call(**{name: choice})
            if call is dispatch.using:
                with result:
                    assert dispatch.asked_for("mlp") == choice
            elif isinstance(result, Tensor):
                assert result.isfinite().all()


def test_modules_that_are_built_as_advised_run() -> None:
    with pytest.raises(ValueError, match="heads must divide the width 8"):
        fastvit_kernels.FusedAttention(8, 3)
    assert fastvit_kernels.FusedAttention(8, 4)(torch.zeros(1, 2, 8)).shape == (1, 2, 8)
    with pytest.raises(ValueError, match="with kind 'sigmoid' it must be 0"):
        fastvit_kernels.FusedCrossEntropy("sigmoid", z_loss=1e-4)
    loss = fastvit_kernels.FusedCrossEntropy("sigmoid", z_loss=0)(LOGITS, LABELS)
    exact = nn.functional.binary_cross_entropy_with_logits(LOGITS, SOFT, reduction="sum") / 3
    torch.testing.assert_close(loss, exact)


# ---- launch parameters

HOPPER = Gpu("sm_90", 132, "X90")
MADE = Provenance("X90", True, "measured in a test", "2026-01-01", "3.6", "2.11", table.TOOL)
ENTRY = Entry(
    "attention_fwd_kernel", {"head_dim": 80, "dtype": "bfloat16", "tokens": 257}, Tiling(16, 32, 4, 1)._asdict(),
    2.0, 1.0, 0.01, "source",
)  # fmt: skip


@pytest.mark.parametrize("change", [{"kernel": "fast_kernel"}, {"use": {"rows": 64}}])
def test_a_table_that_is_measured_again_as_advised_serves(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool keeps what a file has: so the file that does not fit must go first, and may not be in force."""
    path = tmp_path / "X90.json"
    table.save(Table(MADE, (replace(ENTRY, **change),)), path)
    with table.using(table.load(path)), pytest.raises(ValueError, match="X90.json") as refused:
        forward_tiling(80, torch.bfloat16, 257, HOPPER)
    assert "remove it, unset FASTVIT_TUNING, and measure again with `python -m fastvit_kernels.tuning`" in str(
        refused.value
    )
    path.unlink()
    measured = replace(ENTRY, where={**ENTRY.where, "tokens": 256})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tuning"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "LocalGpu", lambda *_: type("Gpu", (), {"gpu": HOPPER, "compiler": _Compiler()})())
    monkeypatch.setattr(tool.search, "cases", lambda *_: [])

    def tune(cases: object, machine: object, before: Table, out: Path, **options: object) -> Table:
        after = replace(before, entries=(*before.entries, measured))
        table.save(after, out)
        return after

    monkeypatch.setattr(tool.search, "tune", tune)
    assert tool.main() == 0
    with table.using(table.load(path)):
        assert forward_tiling(80, torch.bfloat16, 257, HOPPER).rows == 16


class _Compiler:
    def close(self) -> None:
        pass


def test_a_file_of_another_gpu_is_no_longer_in_force_once_the_variable_is_unset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_own", "own.json")
    monkeypatch.setattr(table, "_own_table", Table(MADE, (ENTRY,)))
    other = HOPPER._replace(name="Y100")
    table.forget()
    with pytest.raises(
        ValueError, match="is for X90, but this GPU is Y100: unset it, or measure this GPU with `python"
    ):
        forward_tiling(80, torch.bfloat16, 257, other)
    monkeypatch.setattr(table, "_own_table", None)
    table.forget()
    assert forward_tiling(80, torch.bfloat16, 257, other) == forward_tiling.default(80, torch.bfloat16, 257, other)
    table.forget()


def test_a_command_says_in_one_sentence_that_its_tuning_file_is_wrong(tmp_path: Path) -> None:
    absent = tmp_path / "absent.json"
    done = _run("-m fastvit_kernels.tuning --help", FASTVIT_TUNING=str(absent))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"fastvit_kernels: tuning file {absent} cannot be read: No such file or directory: correct the path\n"
    )
    table.save(Table(MADE), absent)
    assert table.load(absent).provenance == MADE
