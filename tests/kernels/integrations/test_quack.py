import pytest
import torch

from fastvit_kernels import accelerate, dispatch
from tests.kernels import fake_quack


def test_the_table_of_accelerate_says_whether_quack_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, num_classes=0)
    report = accelerate(model.to(torch.bfloat16))
    failing = ["triton + error", "(quack-kernels 0.9 is installed"]
    for version, said in (("0.6.5", ["triton + quack"]), ("0.9", failing)):
        fake_quack.install(monkeypatch, version)
        with dispatch.using("triton,gemm=quack"):
            assert all(words in str(report) for words in said)
        with dispatch.using("triton"):
            assert "quack" not in str(report)
