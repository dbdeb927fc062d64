"""What tests of several rooms share: small shards of real images, real runs of a tiny model, and an S3 server."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_engine.config import Config
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.engine.deepspeed import forget_process_groups
from tests.fastvit_engine.warm_ranks import run_ranks

Members = Iterable[tuple[str, bytes]]

TINY_RUN = [
    "model.name=Ti/4",
    "model.image_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "train.duration=20 steps",
    "train.global_batch_size=32",
    "train.log_every=1",
    "data.num_workers=0",
    "data.eval=null",
    "evaluate.every=null",
    "checkpoint.every=null",
]


# ---- shards


def _encode(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(pixels, "JPEG" | "PNG" | "WEBP", **options) -> bytes"""
    return _encode


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    """photo(number, height=30, width=40) -> a JPEG with smooth content that differs from number to number"""

    def make(number: int, height: int = 30, width: int = 40) -> bytes:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        return _encode(np.asarray(coarse.resize((width, height))), "JPEG", quality=90)

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    """write_tar(path, [(member name, bytes), ...]) -> path; gzipped where the name ends in .gz"""

    def write(path: Path, members: Members) -> Path:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture(scope="session")
def sample_members(photo: Callable[..., bytes]) -> Callable[[Iterable[int]], list[tuple[str, bytes]]]:
    """sample_members(numbers) -> image and label members of the samples s000, s001, ...; label = number % 3"""

    def make(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
        pairs = [((f"s{n:03d}.jpg", photo(n)), (f"s{n:03d}.cls", str(n % 3).encode())) for n in numbers]
        return [member for pair in pairs for member in pair]

    return make


def _write_shards(folder: Path, write_tar: Any, sample_members: Any, gzipped: int | None) -> Path:
    start = 0
    for number, size in enumerate([5, 3, 8, 6, 1, 5, 7]):
        suffix = ".tar.gz" if number == gzipped else ".tar"
        write_tar(folder / f"part-{number}{suffix}", sample_members(range(start, start + size)))
        start += size
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, write_tar: Any, sample_members: Any) -> Path:
    """A folder of seven uneven shards with the samples s000 .. s034 in order."""
    return _write_shards(tmp_path_factory.mktemp("shards"), write_tar, sample_members, None)


@pytest.fixture(scope="session")
def gzipped_shards(tmp_path_factory: pytest.TempPathFactory, write_tar: Any, sample_members: Any) -> Path:
    """The same samples, with one shard of the seven gzipped."""
    return _write_shards(tmp_path_factory.mktemp("gzipped"), write_tar, sample_members, 2)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """make_config(train, eval="", batch=8, **data) -> a configuration for 16-pixel images of three classes"""

    def make(
        train: Path | str | list[Any], eval: Path | str = "", batch: int = 8, seed: int = 0, **data: Any
    ) -> Config:
        data = {"num_workers": 0, "shuffle_buffer": 4} | data
        train = train if isinstance(train, list) else str(train)
        return Config.model_validate(
            {
                "seed": seed,
                "model": {"name": "Ti/4", "image_size": 16, "num_classes": 3},
                "data": {"train": train, "eval": str(eval)} | data,
                "train": {"global_batch_size": batch},
            }
        )

    return make


@pytest.fixture(scope="session")
def real_data(pytestconfig: pytest.Config) -> Path:
    """The folder with real shards beside the repository."""
    folder = pytestconfig.rootpath.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real shards at {folder}")
    return folder


# ---- runs


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digit scans as 8 training and 2 evaluation shards."""
    folder = tmp_path_factory.mktemp("digits")
    make_dataset("digits", folder, eval_fraction=0.2, samples_per_shard=200, seed=0, progress=lambda text: None)
    return folder


@pytest.fixture(scope="session")
def train_arguments(digits):
    """What follows `fastvit` in the command line of a tiny run."""

    def build(out, *settings, resume="never"):
        everything = [f"data.train={digits}/train-*.tar", *TINY_RUN, *settings]
        arguments = ["train", "quickstart", "--out", str(out), "--resume", resume]
        return arguments + [word for setting in everything for word in ("--set", setting)]

    return build


@pytest.fixture(scope="session")
def train_command(train_arguments):
    """The command line of a tiny run: `train_command(out, "zero.stage=2", processes=2, resume="auto")`."""

    def build(out, *settings, processes=1, resume="never", max_restarts=0):
        command = [sys.executable, "-m", "fastvit_engine", *train_arguments(out, *settings, resume=resume)]
        return [*command, "--cpu-processes", str(processes), "--max-restarts", str(max_restarts)]

    return build


@pytest.fixture(scope="session")
def execute():
    """Runs a command to its end, with one thread a process so that results do not depend on the machine's load."""

    def run(command, **environment):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture(scope="session")
def train(train_arguments, tmp_path_factory):
    """Runs a tiny training to its end and returns its run folder. Where it is not the start that is tested."""

    def run(out, *settings, processes=1, resume="never") -> Path:
        log = tmp_path_factory.mktemp("train") / "log"
        assert run_ranks(train_arguments(out, *settings, resume=resume), processes, log), log.read_text()
        return out

    return run


@pytest.fixture(scope="module")
def lone_world() -> Iterator[World]:
    """A job of one process: this one."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 exchanges it, for good
        with join_world() as world:
            yield world
        forget_process_groups()


# ---- an object store


class Bucket:
    """What tests do to objects behind the engine's back, by "BUCKET/KEY"."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def pipe_file(self, path: str, content: bytes) -> None:
        bucket, _, key = path.partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def cat_file(self, path: str) -> bytes:
        bucket, _, key = path.partition("/")
        content: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def find(self, path: str) -> list[str]:
        """The paths that begin so."""
        bucket, _, prefix = path.partition("/")
        found = self.client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return [f"{bucket}/{entry['Key']}" for entry in found]

    def exists(self, path: str) -> bool:
        return path in self.find(path)

    def rm(self, path: str) -> None:
        """Removes what begins so."""
        for found in self.find(path):
            bucket, _, key = found.partition("/")
            self.client.delete_object(Bucket=bucket, Key=key)


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[Bucket]:
    """A server that speaks S3, with an empty bucket named "bucket"; s3:// leads to it."""
    pytest.importorskip("obstore", reason="needs obstore: pip install obstore")
    boto3 = pytest.importorskip("boto3", reason="needs boto3: pip install boto3")
    server_module = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[s3]' flask flask-cors")
    with pytest.MonkeyPatch.context() as patch:
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield Bucket(client)
        server.stop()
