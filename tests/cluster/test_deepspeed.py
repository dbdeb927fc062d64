"""launch/deepspeed/run.sh on several hosts, over sshd and pdsh as they are."""

import shutil
import subprocess

import pytest

from tests.cluster.harness import EVERYTHING, LAUNCH, SHARD_EVERYTHING, assert_same_curve, rows
from tests.cluster.hosts import wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = ["bash", str(LAUNCH / "deepspeed" / "run.sh")]
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")
CLIENT = "Host *\n  IdentityFile {key}\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
SERVER = "HostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\n"


@pytest.fixture(scope="module")
def ssh_hosts(hosts, tmp_path_factory):
    """Hosts that one may go to by ssh from each other, without a password."""
    for program in ("ssh", "ssh-keygen", "pdsh"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if SSHD is None:
        pytest.skip("needs sshd")
    key = tmp_path_factory.mktemp("ssh") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    subprocess.run(["mkdir", "-p", "/run/sshd"], check=True)  # sshd insists
    servers = []
    for host in range(hosts.count):
        folder = hosts.etc(host) / "ssh"
        folder.mkdir()
        (folder / "ssh_config").write_text(CLIENT.format(key=key))
        (folder / "sshd_config").write_text(SERVER.format(key=key))
        servers.append(hosts.start(host, [SSHD, "-D"], stderr=subprocess.DEVNULL))
    for host in range(hosts.count):
        wait_until(lambda host=host: hosts.run(0, ["ssh", hosts.name(host), "true"]).returncode == 0, what="sshd")
    yield hosts
    for server in servers:
        server.kill()
        server.wait()


@pytest.fixture
def hostfile(tmp_path):
    def write(*lines):
        path = tmp_path / "hostfile"
        path.write_text("\n".join(lines) + "\n")
        return ["--hostfile", str(path)]

    return write


def test_two_hosts_follow_the_curve_of_one_process(ssh_hosts, jobs, hostfile, training, single, tmp_path):
    """Settings with spaces, braces and a percent sign arrive as they were."""
    arguments = training(tmp_path / "run", "zero.stage=2", "name=100%n it's {a..b} $HOME")
    jobs.start(0, [*RUN, *hostfile("node-0 slots=1", "node-1 slots=1"), "--", *arguments])
    codes, output = jobs.wait()
    assert codes == [0], output
    assert "[INFO]" not in output  # which --verbose shows
    assert "name: 100%n it's {a..b} $HOME" in (tmp_path / "run" / "config.yaml").read_text()
    assert_same_curve(tmp_path / "run", single)


@pytest.mark.skipif(not EVERYTHING, reason="the whole matrix takes minutes: FASTVIT_TEST_CLUSTER=all")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_three_hosts(ssh_hosts, jobs, hostfile, training, single, tmp_path, stage, processes):
    arguments = training(tmp_path / "run", f"zero.stage={stage}", *([SHARD_EVERYTHING] if stage == 3 else []))
    jobs.start(0, [*RUN, *hostfile(*(f"node-{host} slots={processes}" for host in range(3))), "--", *arguments])
    codes, output = jobs.wait()
    assert codes == [0], output
    assert_same_curve(tmp_path / "run", single)


@pytest.mark.skipif(not EVERYTHING, reason="the whole matrix takes minutes: FASTVIT_TEST_CLUSTER=all")
def test_a_killed_host_is_restarted_from_the_checkpoint(ssh_hosts, jobs, hostfile, training, single, tmp_path):
    out = tmp_path / "run"
    jobs.start(0, [*RUN, *hostfile("node-0 slots=1", "node-1 slots=1"), "--", *training(out)])
    begun = [out / "checkpoints" / "latest", out / "metrics.jsonl"]
    wait_until(lambda: all(path.exists() for path in begun), what="the first checkpoint and the first step")
    assert len(rows(out)) < 12
    ssh_hosts.run(1, ["sh", "-c", "kill -9 $(pgrep -f 'fastvit_engine trai[n]' --ns $$ --nslist net)"])
    codes, output = jobs.wait()
    assert codes == [0], output
    assert "restart 1 of 3" in output
    assert_same_curve(out, single)


@pytest.mark.skipif(not EVERYTHING, reason="the whole matrix takes minutes: FASTVIT_TEST_CLUSTER=all")
def test_bad_input_is_one_sentence_from_one_rank(ssh_hosts, jobs, hostfile, training, tmp_path):
    arguments = training(tmp_path / "run", "train.global_batch_size=2")
    jobs.start(0, [*RUN, *hostfile(*(f"node-{host} slots=1" for host in range(3))), "--", *arguments])
    codes, output = jobs.wait()
    assert codes == [2], output
    (line,) = [line for line in output.splitlines() if "fastvit: error:" in line]
    assert "train.global_batch_size is 2, fewer images than the 3 processes" in line
    assert "exits with return code" not in output


def test_a_host_that_ssh_does_not_reach_is_named(ssh_hosts, jobs, hostfile, training, tmp_path):
    lines = hostfile("node-0 slots=1", "node-1 slots=1")
    ssh_hosts.cut(1)
    jobs.start(0, [*RUN, *lines, "--", *training(tmp_path / "run")])
    codes, output = jobs.wait(60)
    assert codes == [2]
    assert "node-1 cannot be used: ssh must need no password" in output
