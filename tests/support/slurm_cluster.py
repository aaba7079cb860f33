"""Starts a real SLURM on loopback: munged, slurmctld and one slurmd a node, all on this machine, as root."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

# Without accounting, sacct would fail, and submitit would wait forever for a job that died without a result. The
# controller knows the same about the jobs that it remembers.
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
exec squeue --noheader --array --states=all --format='%i|%T|%N'
"""

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits until the credentials of its last run have expired.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/ctld
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=defer,batch_sched_delay=1,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=10
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=60 State=UP
PartitionName=short Nodes=n1 MaxTime=5 State=UP
"""


def why_not() -> str | None:
    """The reason why SLURM cannot start here; None if it can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"SLURM is not installed ({', '.join(missing)}): apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    host = socket.gethostname().partition(".")[0]
    with suppress(OSError):
        if socket.gethostbyname(host).startswith("127."):
            return None
    return f"the name of this machine, {host}, is not one of loopback: add '127.0.0.1 {host}' to /etc/hosts"


class Cluster:
    """`with Cluster(2) as cluster`: SLURM with nodes n1 and n2. `env` is the environment of its commands."""

    def __init__(self, num_nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, because the path of a socket is limited
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.env = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *arguments: str) -> str:
        """The output of a command of SLURM."""
        return subprocess.run(arguments, env=self.env, check=True, capture_output=True, text=True).stdout

    def jobs(self) -> dict[str, str]:
        """The state of every job since the start of the cluster, by its id: `1_0`."""
        lines = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def kill(self, number: signal.Signals, **environment: str) -> None:
        """Sends a signal to every process that SLURM started with these variables in its environment."""
        wanted = {f"{name}={value}".encode() for name, value in environment.items()}
        wanted.add(f"SLURM_CONF={self.env['SLURM_CONF']}".encode())
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    os.kill(int(process.name), number)

    def stop_node(self, node: str) -> None:
        """Ends a node as a power failure would, with everything that ran on it."""
        daemon = self._daemons[2 + self.nodes.index(node)]
        daemon.kill()
        daemon.wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        self.kill(signal.SIGKILL, SLURMD_NODENAME=node)

    def start_node(self, node: str) -> None:
        """Starts the daemon of a stopped node, and returns the node to service."""
        self._daemons[2 + self.nodes.index(node)] = self._daemon("slurmd", "-D", "-N", node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def _start(self) -> None:
        for name in ("ctld", "munge", "bin"):
            (self.folder / name).mkdir()
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir(parents=True)
        self.folder.chmod(0o755)
        sacct = self.folder / "bin" / "sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)
        ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().partition(".")[0]
        described = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={os.cpu_count()} "
            "RealMemory=4000 Gres=gpu:1 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        conf = CONF.format(host=host, ports=ports, folder=self.folder, nodes=described)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        munge = {"key-file": key, "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        flags = [f"--{flag}={key.parent / str(name)}" for flag, name in munge.items()]
        self._daemons.append(self._daemon("munged", "--foreground", "--force", "--num-threads=2", *flags))
        _until(lambda: (self.folder / "munge" / "socket").exists(), "munged does not start")
        self._daemons.append(self._daemon("slurmctld", "-D"))
        self._daemons += [self._daemon("slurmd", "-D", "-N", node) for node in self.nodes]
        _until(self._is_up, f"SLURM does not come up: see {self.folder}")

    def _is_up(self) -> bool:
        with suppress(subprocess.CalledProcessError):
            # It names a node once for each of its partitions.
            return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == set(self.nodes)
        return False

    def _daemon(self, *command: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            return subprocess.Popen(command, env=self.env, stdout=out, stderr=out)

    def _stop(self) -> None:
        with suppress(Exception):
            self.run("scancel", "--full", "--user=root")
            _until(lambda: not self.run("squeue", "--noheader").strip(), "", patience_s=10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _until(is_so: Callable[[], bool], message: str, *, patience_s: float = 30) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(message)
        time.sleep(0.1)


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
