"""A SLURM cluster of the hosts: a controller on the first, a slurmd on each, with a configuration of its own."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster.hosts import Hosts, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = "/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin"

# cred_expire: a requeued job waits that long.
CONFIGURATION = """
ClusterName=fastvit
SlurmctldHost=node-0({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"needs {', '.join(absent)} (slurm-wlm and munge)" if absent else None


class Slurm:
    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.folder = Path(tempfile.mkdtemp(prefix="fastvit-slurm-"))
        self.folder.chmod(0o755)  # munge's socket must be reachable
        (self.folder / "state").mkdir()
        self.configuration = self.folder / "slurm.conf"
        nodes = [
            f"NodeName={hosts.name(host)} NodeAddr={hosts.address(host)} CPUs=4 State=UNKNOWN"
            for host in range(hosts.count)
        ]
        text = CONFIGURATION.format(controller=hosts.address(0), folder=self.folder, nodes="\n".join(nodes))
        self.configuration.write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # not looked for: there may be none
        self.daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self._start_munge()
        self._start_daemon(0, "slurmctld")
        for host in range(self.hosts.count):
            (self.folder / f"spool-{self.hosts.name(host)}").mkdir()
            self._start_daemon(host, "slurmd")
        wait_until(self._all_idle, what="the SLURM cluster")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(bytes(range(256)) * 4)
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munge.pid"}
        files |= {"log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        munged = shutil.which("munged", path=PATH)
        assert munged is not None
        self.munge = subprocess.Popen([munged, "--foreground", "--force", *options], stderr=subprocess.DEVNULL)
        wait_until((self.folder / "munge.socket").exists, what="munged")

    def _start_daemon(self, host: int, name: str) -> None:
        program = shutil.which(name, path=PATH)
        assert program is not None
        with open(self.folder / f"{name}-{host}.out", "wb") as log:
            command = [program, "-D", "-f", str(self.configuration)]
            self.daemons.append(self.hosts.start(host, command, stdout=log, stderr=subprocess.STDOUT))

    def _all_idle(self) -> bool:
        listed = self.run("sinfo", "--noheader", "--Node", "--format", "%T")
        return listed.stdout.split() == ["idle"] * self.hosts.count

    def run(self, *command: str, **options: object) -> "subprocess.CompletedProcess[str]":
        """A command of SLURM's, on the first host."""
        return self.hosts.run(0, ["env", f"SLURM_CONF={self.configuration}", *command], **options)  # type: ignore[arg-type]

    def state(self, job: str) -> str:
        listed = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return next((word.removeprefix("JobState=") for word in listed.split() if word.startswith("JobState=")), "")

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for host in range(self.hosts.count):
            self.hosts.kill_all(host)
        self.munge.kill()
        self.munge.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
