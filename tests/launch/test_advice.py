"""Advice of the launchers: what their sentences tell to do is done, and the same command works."""

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
TORCHRUN, DEEPSPEED, SLURM, POD = "torchrun/run.sh", "deepspeed/run.sh", "slurm/train.sbatch", "kubernetes/pod.sh"
# A Python that answers for the real one: two GPUs, eight cores, the way to the head node, and a training that only says
# that it ran.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
    *route.py*) echo 10.0.0.1 10.0.0.1 eth0 ;;
    *device_count*) echo 2 ;;
    *cores_here*) echo 8 ;;
    *create_server*) exec {sys.executable} "$@" ;;
    *) echo "trained: $*" ;;
esac
"""


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def hosts(tmp_path):
    """Hostfiles by name, and a folder of programs with a pdsh."""
    for name, text in {"two": "localhost slots=2\n127.0.0.1 slots=2\n", "bare": "localhost\n", "none": "# none\n",
                       "twice": "localhost slots=2\nlocalhost slots=2\n"}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "pdsh").chmod(0o755)


@pytest.mark.parametrize(
    ("name", "refused", "advice", "followed"),
    [
        (TORCHRUN, "--nodes 2 -- quickstart", "--head is missing: the name or address of the node",
         "--nodes 2 --head 10.0.0.1 -- quickstart"),
        (TORCHRUN, "--nodes 4:2 --head h -- quickstart", "the smaller number first",
         "--nodes 2:4 --head h -- quickstart"),
        (TORCHRUN, "--nodes two -- quickstart", "a number, or MIN:MAX", "--nodes 1 -- quickstart"),
        (TORCHRUN, "--nodes two --head h -- quickstart", "a number, or MIN:MAX", "--nodes 1:2 --head h -- quickstart"),
        (TORCHRUN, "--max-restarts many -- quickstart", "a number", "--max-restarts 4 -- quickstart"),
        (TORCHRUN, "--grace long -- quickstart", "a number of seconds", "--grace 60 -- quickstart"),
        (TORCHRUN, "--processes-per-node all -- quickstart", "a number, or 'gpu'",
         "--processes-per-node gpu -- quickstart"),
        (TORCHRUN, "--processes-per-node 4 -- quickstart", "has 2 GPUs: one process per GPU",
         "--processes-per-node 2 -- quickstart"),
        (TORCHRUN, "quickstart", "arguments of the training go after --", "-- quickstart"),
        (TORCHRUN, "--nodes 1 --", "no recipe after --", "--nodes 1 -- quickstart"),
        (TORCHRUN, "--nodes", "--nodes needs a value", "--nodes 1 -- quickstart"),
        (DEEPSPEED, "-- quickstart", "--hostfile is missing", "--hostfile two -- quickstart"),
        (DEEPSPEED, "--hostfile absent -- quickstart", "there is no hostfile absent", "--hostfile two -- quickstart"),
        (DEEPSPEED, "--hostfile bare -- quickstart", "is no 'HOST slots=N'", "--hostfile two -- quickstart"),
        (DEEPSPEED, "--hostfile twice -- quickstart", "names localhost twice", "--hostfile two -- quickstart"),
        (DEEPSPEED, "--hostfile none -- quickstart", "names no host", "--hostfile two -- quickstart"),
        (DEEPSPEED, "--hostfile two --port http -- quickstart", "a number", "--hostfile two --port 80 -- quickstart"),
        (SLURM, "--apptainer a --container-image b -- quickstart", "exclude each other", "--apptainer a -- quickstart"),
        (SLURM, "--container-mounts /a:/b -- quickstart", "is for containers",
         "--container-mounts /a:/b --container-image b -- quickstart"),
        (SLURM, "--max-requeues many -- quickstart", "are numbers", "--max-requeues 2 -- quickstart"),
    ],
)  # fmt: skip
def test_an_option_that_is_given_as_advised_is_taken(
    script, tmp_path, hosts, python, monkeypatch, name, refused, advice, followed
):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    done = script(name, "--dry-run", *refused.split(), PYTHON=python)
    assert done.returncode == 2 and advice in done.stderr
    done = script(name, "--dry-run", *followed.split(), PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert "fastvit_engine train" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(TORCHRUN, []), (DEEPSPEED, ["--hostfile", "two"]), (SLURM, []), (POD, ["--nodes", "1"])],
)
def test_without_python_the_advice_is_to_set_it(script, tmp_path, hosts, python, monkeypatch, name, arguments):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    pod = {"RANK": "0", "MASTER_ADDR": "localhost", "POD_IP": "10.0.0.1"} if name == POD else {}
    given = [*arguments, "--dry-run", "--", "quickstart"]
    done = script(name, *given, PYTHON="no-such-python", **pod)
    assert done.returncode == 2
    assert done.stderr == (
        "launch: error: there is no 'no-such-python' on the PATH: activate the environment, or set PYTHON\n"
    )
    done = script(name, *given, PYTHON=python, **pod)
    assert done.returncode == 0, done.stderr
    activated = tmp_path / "bin" / "no-such-python"
    shutil.copy(python, activated)
    assert script(name, *given, PYTHON="no-such-python", **pod).returncode == 0


def test_a_python_without_pytorch_is_said_not_shown_as_a_traceback(script, tmp_path, python):
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named torch' >&2; exit 1\n")
    other.chmod(0o755)
    done = script(TORCHRUN, "--dry-run", "--", "quickstart", PYTHON=str(other))
    assert done.returncode == 2
    assert done.stderr == (f"launch: error: '{other}' cannot import torch: activate the environment, or set PYTHON\n")
    assert script(TORCHRUN, "--dry-run", "--", "quickstart", PYTHON=python).returncode == 0


def test_another_port_is_taken_as_advised(script, python):
    with socket.create_server(("", 0)) as busy, socket.create_server(("", 0)) as other:
        port, free = busy.getsockname()[1], other.getsockname()[1]
        other.close()
        done = script(TORCHRUN, "--nodes", "2", "--head", f"node:{port}", "--", "quickstart", PYTHON=python)
        assert done.returncode == 2
        advised = re.search(rf"port {port} of .* is taken, .*: choose one with --head (node:)PORT", done.stderr)
        assert advised
        head = f"{advised[1]}{free}"
        done = script(TORCHRUN, "--nodes", "2", "--head", head, "--", "quickstart", PYTHON=python)
        assert done.returncode == 0 and f"--rdzv-endpoint 10.0.0.1:{free}" in done.stdout


def test_a_job_script_that_was_submitted_elsewhere_finds_the_repository_as_advised(tmp_path, python):
    copy = tmp_path / "spool" / "slurm" / "job" / "script"
    copy.parent.mkdir(parents=True)
    shutil.copy(LAUNCH / SLURM, copy)

    def submit(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, **variables}
        command = ["bash", str(copy), "--dry-run", "--", "quickstart"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = submit(SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        f"launch: error: {tmp_path} is not this repository: submit from its root, or set FASTVIT_HOME\n"
    )
    assert submit(SLURM_SUBMIT_DIR=str(REPOSITORY)).returncode == 0
    assert submit(SLURM_SUBMIT_DIR=str(tmp_path), FASTVIT_HOME=str(REPOSITORY)).returncode == 0


@pytest.mark.parametrize("prefix", ["", "PET_"])
def test_a_pod_with_the_variables_that_are_named_starts(script, python, prefix):
    given = ["--nodes", "2", "--dry-run", "--", "quickstart"]
    done = script(POD, *given, PYTHON=python)
    assert done.returncode == 2
    assert "neither RANK and MASTER_ADDR nor PET_NODE_RANK and PET_MASTER_ADDR are set" in done.stderr
    rank = "PET_NODE_RANK" if prefix else "RANK"
    done = script(POD, *given, PYTHON=python, **{rank: "1", f"{prefix}MASTER_ADDR": "node-0"})
    assert done.returncode == 0, done.stderr


def test_a_launcher_without_pdsh_runs_once_it_is_installed(script, tmp_path, hosts, python):
    for program in ("bash", "dirname", "grep", "getent", "hostname", "id", "nproc", "sed"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    pdsh = (tmp_path / "bin" / "pdsh").rename(tmp_path / "pdsh")
    given = ["--hostfile", "two", "--dry-run", "--", "quickstart"]
    done = script(DEEPSPEED, *given, PYTHON=python, PATH=str(tmp_path / "bin"))
    assert done.returncode == 2 and "needs pdsh: install it on this host" in done.stderr
    pdsh.rename(tmp_path / "bin" / "pdsh")
    done = script(DEEPSPEED, *given, PYTHON=python, PATH=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr


def test_a_variable_of_the_venv_script_reaches_every_host_as_it_is(script, tmp_path, hosts, python, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    secret = "a$(id)b"
    given = ["--hostfile", "two", "--dry-run"]
    done = script(DEEPSPEED, *given, "--", "quickstart", PYTHON=python, HF_TOKEN=secret)
    assert done.returncode == 2 and "set it in --venv-script instead" in done.stderr
    (tmp_path / "venv.sh").write_text(f"export HF_TOKEN='{secret}'\n")
    done = script(DEEPSPEED, *given, "--venv-script", str(tmp_path / "venv.sh"), "--", "quickstart", PYTHON=python)
    assert done.returncode == 0, done.stderr
    told = re.search(r"--venv_script (.+?) --module", done.stdout)
    assert told
    sourced = subprocess.run(
        ["bash", "-c", f"source {told[1].replace(chr(92) + ' ', ' ')}; printf %s \"$HF_TOKEN\""],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (sourced.returncode, sourced.stdout) == (0, secret), sourced.stderr


# ---- the way to the head node


@pytest.fixture
def route(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    spec = importlib.util.spec_from_file_location("launch_route", LAUNCH / "route.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    yield module


def test_an_interface_that_is_set_as_advised_is_taken(route, monkeypatch, capsys):
    monkeypatch.setattr(route, "own_address_towards", lambda address: "10.0.0.7")
    monkeypatch.setattr(route.psutil, "net_if_addrs", dict)
    with pytest.raises(SystemExit) as ended:
        route.main("10.0.0.1")
    assert ended.value.code == 2
    assert "no network interface has the address 10.0.0.7: set GLOO_SOCKET_IFNAME yourself" in capsys.readouterr().err
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    route.main("10.0.0.1")
    assert capsys.readouterr().out == "10.0.0.1 10.0.0.7 eth7\n"


@pytest.mark.parametrize("problem", ["nowhere.invalid", "localhost"])
def test_an_address_that_is_given_as_advised_is_taken(route, monkeypatch, capsys, problem):
    monkeypatch.setattr(route, "own_address_towards", lambda address: "10.0.0.7")
    monkeypatch.setattr(route, "interface_with", lambda address: "eth0")
    with pytest.raises(SystemExit) as ended:
        route.main(problem)
    assert ended.value.code == 2
    assert re.search("give (its address|the address that the others use)", capsys.readouterr().err)
    route.main("10.0.0.1")
    assert capsys.readouterr().out == "10.0.0.1 10.0.0.7 eth0\n"


# ---- apex


def test_apex_is_built_once_every_piece_of_advice_is_followed(script, tmp_path):
    """The programs are in the place of real ones: each absent or wrong until the sentence before told so."""
    bin = tmp_path / "bin"
    (bin / "toolkit" / "bin").mkdir(parents=True)
    for program in ("bash", "sed", "mktemp", "rm"):
        (bin / program).symlink_to(shutil.which(program))

    def write(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def ask(**variables: str) -> subprocess.CompletedProcess[str]:
        return script("install_apex.sh", PYTHON=str(tmp_path / "python"), PATH=str(bin), **variables)

    def answers(summary: str, cuda: str, torch: int = 0) -> str:
        return (
            f'case "$*" in *"pip show"*) echo "Summary: {summary}";; *amp_C*print*) echo built;; *amp_C*) exit 1;;\n'
            f'*version.cuda*) echo "{cuda}"; exit {torch};; *"pip install"*) ;; esac'
        )

    write(tmp_path / "python", answers("Pyramid toolkit", ""))
    assert "pip uninstall apex" in ask().stderr
    write(tmp_path / "python", answers("", "", torch=1))
    assert "git is missing" in ask().stderr
    write(bin / "git", "exit 0")
    assert "has no PyTorch: install it first" in ask().stderr
    write(tmp_path / "python", answers("", ""))
    assert "built without CUDA" in ask().stderr
    write(tmp_path / "python", answers("", "12.8"))
    assert "nvcc is missing: install the CUDA toolkit 12.8, or set CUDA_HOME" in ask().stderr
    write(bin / "toolkit" / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.0, V1'")
    home = str(bin / "toolkit")
    assert "nvcc is of CUDA 11.0 and PyTorch of CUDA 12.8" in ask(CUDA_HOME=home).stderr
    write(bin / "toolkit" / "bin" / "nvcc", "echo 'Cuda compilation tools, release 12.8, V1'")
    done = ask(CUDA_HOME=home)
    assert (done.returncode, done.stdout) == (0, "built\n"), done.stderr
