"""A SLURM of two nodes on this machine: munge, slurmctld and two slurmd on the loopback address.

    with Loopback(folder) as cluster:
        subprocess.run(["srun", "hostname"], env=cluster.environment)
        cluster.kill("n1")

Debian's packages slurm-wlm and munge are enough, and nothing of them is configured in /etc: all
files are in the folder that is given. The nodes are processes, so they share this machine's
processors and its files, as nodes of a cluster share a file system.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "setpriv")
NODES = ("n1", "n2")
PARTITION = "cpu"
NODE = "SPKIT_LOOPBACK_NODE"  # in the environment of a slurmd and of the steps that it starts
PATIENCE = 60  # seconds until a daemon must answer
SILENCE = 20  # seconds until a node that says nothing is taken for dead

CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SlurmdTimeout={silence}
SlurmctldTimeout=60
MessageTimeout=30
KillWait=5
MinJobAge=86400
ReturnToService=1
{nodes}
PartitionName={partition} Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class CannotStart(Exception):
    """One sentence: what is missing on this machine."""


class Loopback:
    """The cluster, while the block lasts. `environment` is what its commands are to be run with."""

    def __init__(self, folder: Path, cpus: int = 2, memory_mb: int = 8_000):
        self.folder = folder
        self.config = folder / "slurm.conf"
        path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", "")])
        self.environment = os.environ | {"SLURM_CONF": str(self.config), "PATH": path}
        self.cpus, self.memory_mb = cpus, memory_mb
        self.stack = ExitStack()

    def __enter__(self) -> "Loopback":
        missing = [name for name in PROGRAMS if find(name) is None]
        if missing:
            raise CannotStart(f"not installed here: {', '.join(missing)}")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """End the jobs and the daemons, and whatever a killed daemon left behind."""
        with suppress(OSError, subprocess.TimeoutExpired):
            self.ask("scancel", "--user", str(os.getuid()), seconds=10)
        self.stack.close()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self) -> None:
        write_config(self.config, self.cpus, self.memory_mb)
        write_srun(self.folder / "bin" / "srun", self.config)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # a folder of a test is not as closed as munge asks for; --force makes that a warning
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"seed-file": "munge.seed", "log-file": "munge.log"}
        named = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._daemon("munged", "--foreground", "--force", *named)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munge.log")
        self._daemon("slurmctld", "-D", "-f", str(self.config))
        self._until(lambda: self.ask("scontrol", "ping").returncode == 0, "slurmctld.log")
        for node in NODES:
            self.boot(node)
        self._until(lambda: set(self.idle()) == set(NODES), f"slurmd-{NODES[0]}.log")

    def boot(self, node: str) -> None:
        """Start a node's slurmd."""
        self._daemon("slurmd", "-D", "-f", str(self.config), "-N", node, node=node)

    def kill(self, node: str, steps: bool = True) -> int:
        """Let a node die: SIGKILL for its slurmd, its running steps, and all that these started.

        steps=False: for its slurmd alone, as a fault of that program. The processes killed.
        """
        found = self.processes(node)
        if not steps:
            found = [pid for pid in found if program(pid) == "slurmd"]
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def ask(self, *command: str, seconds: float = 30) -> subprocess.CompletedProcess:
        """One of SLURM's own commands, and what it printed."""
        kept = {"env": self.environment, "capture_output": True, "text": True, "timeout": seconds}
        return subprocess.run([find(command[0]) or command[0], *command[1:]], check=False, **kept)

    def idle(self) -> list[str]:
        """The nodes that are ready for work."""
        return self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split()

    def running(self, node: str) -> list[str]:
        """The numbers of the jobs that run on a node."""
        return self.ask("squeue", "-h", "-t", "R", "-w", node, "-o", "%i").stdout.split()

    def processes(self, node: str | None = None) -> list[int]:
        """What belongs to this cluster (on that node) and still runs: all have its environment."""
        marks = [f"SLURM_CONF={self.config}"]
        where = [f"{NODE}={node}", f"SLURMD_NODENAME={node}"] if node else []
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # another user's, or it has just ended
                has = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                here = not where or any(mark in has for mark in where)
                if marks[0] in has and here and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
        return found

    def _daemon(self, name: str, *arguments: str, node: str | None = None) -> None:
        """Start it, to be stopped at the end; the kernel ends it where this process is killed."""
        with (self.folder / f"{name}.out").open("ab") as log:
            started = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", find(name), *arguments],
                env=self.environment | ({NODE: node} if node else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.stack.callback(stop, started)

    def _until(self, ready, log: str) -> None:
        ends = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > ends:
                path = self.folder / log
                lines = path.read_text(errors="replace").splitlines() if path.exists() else []
                raise CannotStart(f"{log} ends with: {lines[-1] if lines else 'nothing'}")
            time.sleep(0.3)


def find(program: str) -> str | None:
    """Where a program is; daemons are in folders that a user's PATH may lack."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")


def program(pid: int) -> str:
    """The name of a process, "" where it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def stop(process: subprocess.Popen) -> None:
    """End a daemon: by asking, and after some seconds by force."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_config(path: Path, cpus: int, memory_mb: int) -> None:
    """The whole slurm.conf; every port is free at this moment."""
    controller, *ports = free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
        f"RealMemory={memory_mb} State=UNKNOWN"
        for node, port in zip(NODES, ports, strict=True)
    )
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (path.parent / name).mkdir(parents=True)
    values = {"host": socket.gethostname().partition(".")[0], "user": user(), "nodes": nodes}
    values |= {"controller": controller, "partition": PARTITION, "silence": SILENCE}
    path.write_text(CONFIG.format(folder=path.parent, **values).lstrip())


def write_srun(path: Path, config: Path) -> None:
    """An srun that knows the configuration: Snakemake calls it without the variable SLURM_CONF."""
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nSLURM_CONF={config} exec {find("srun")} "$@"\n')
    path.chmod(0o755)


def user() -> str:
    """The name of this user."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def free_ports(number: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
