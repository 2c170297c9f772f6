"""A private Slurm cluster on this machine: one controller, several nodes, everything in one folder and on 127.0.0.1.

Real batch scripts go through the real `sbatch`, `squeue` and `scontrol`; nothing of the system is used or changed. To
look around in one: `python tests/slurm/cluster.py [COMMAND ...]` runs a command (or a shell) with a cluster around it.
"""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client"

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
AuthType=auth/none
CredType=cred/none
# How long a job's old start keeps it from the next one.
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
# Ports of jobs come from their ids, and two clusters may run on one machine at a time.
FirstJobId={first_job}
ReturnToService=2
KillWait=5
MinJobAge=600
SlurmdTimeout={node_timeout}
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=65536 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=60 DefaultTime=60
PartitionName=normal Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""

FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
"""States that a job does not leave, unless it is requeued."""

OUTER = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SCANCEL", "SINFO", "PMI")
"""Beginnings of the variables that a Slurm job around the tests would leave in the environment."""


class SlurmError(RuntimeError):
    """A command of Slurm failed, or something did not happen in time."""


class Cluster:
    """`with Cluster(folder) as cluster: ...`; at the end nothing of it lives, whatever ended the block.

    Args:
        folder: where configuration, logs, state and sockets are; made if need be, and left behind to be read.
        nodes, cpus, gpus: how many nodes there are (`node1`, `node2`, ...) and what each says it has; the GPUs are
            plain files, for batch scripts that ask for some.
        grace: GraceTime of the partition `normal`, in seconds: from the signal of pre-emption to the end.
        node_timeout: SlurmdTimeout, in seconds: from the silence of a node to its jobs' NODE_FAIL.

    Raises:
        SlurmError: with the ends of the daemons' logs, if the nodes are not idle within a minute.
    """

    def __init__(
        self, folder: Path, nodes: int = 4, cpus: int = 4, gpus: int = 8, grace: int = 40, node_timeout: int = 12
    ) -> None:
        self.folder = folder
        self.names = [f"node{number + 1}" for number in range(nodes)]
        self.environment = {key: value for key, value in os.environ.items() if not _outer(key)}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "HF_HUB_OFFLINE": "1"}
        self._settings = {"cpus": cpus, "gpus": gpus, "grace": grace, "node_timeout": node_timeout}
        self._machines: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        self._configure(**self._settings)
        try:
            self._start("controller", "slurmctld", "-D", "-i")
            for name in self.names:
                self._start(name, "slurmd", "-D", "-N", name)
            self._until(self._idle, "the nodes to be idle", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._machines):
            self._machines[name].communicate(b"\n")
            del self._machines[name]

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command prints in the cluster's environment; SlurmError with what it said if it fails."""
        done = subprocess.run(
            command,
            env={**self.environment, **(env or {})},
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            told = f"{done.stdout}{done.stderr}".strip()
            raise SlurmError(f"{' '.join(map(str, command))} ended with {done.returncode}: {told}")
        return done.stdout

    def submit(
        self,
        script: Path,
        *args: str | Path,
        sbatch_flags: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """The id of a new job that runs `script` with `args`; its log is `slurm-ID.out` in `cwd` if it names none."""
        return int(self.run("sbatch", "--parsable", *sbatch_flags, script, *args, env=env, cwd=cwd))

    def state(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Reason, Restarts, ExitCode, NodeList, StdOut, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", shown))

    def log(self, job: int) -> str:
        """What the job has written so far."""
        path = Path(self.state(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(
        self, job: int, until: str | Iterable[str] | Callable[[dict[str, str]], bool] = FINISHED, timeout: float = 60
    ) -> dict[str, str]:
        """The job's fields as soon as it is in one of the states `until`, or the function `until` of them is true.

        Raises:
            SlurmError: with the job's fields and the end of its log, after `timeout` seconds.
        """
        states = {until} if isinstance(until, str) else until if callable(until) else set(until)
        reached = states if callable(states) else lambda fields: fields["JobState"] in states
        fields: dict[str, str] = {}

        def arrived() -> bool:
            fields.update(self.state(job))
            return reached(fields)

        self._until(arrived, f"job {job} to be {getattr(until, '__name__', until)}", timeout, job)
        return fields

    def wait_for_log(self, job: int, text: str, timeout: float = 60) -> str:
        """The job's log, as soon as `text` is in it; else as `wait`."""
        self._until(lambda: text in self.log(job), f"{text!r} in the log of job {job}", timeout, job)
        return self.log(job)

    def cancel(self, job: int, *flags: str) -> None:
        self.run("scancel", *flags, str(job))

    def signal(self, job: int, name: str, *flags: str) -> None:
        """Sends signal `name` (USR1, ...) to the job's steps; with the flag --batch to its script alone."""
        self.run("scancel", f"--signal={name}", *flags, str(job))

    def nodes(self) -> dict[str, str]:
        """The state of each node: IDLE, ALLOCATED, DOWN*, ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %T").splitlines()
        return {name: state.upper() for name, state in map(str.split, lines)}

    def kill_node(self, name: str) -> None:
        """Ends a node like a power cut: its daemon and every process of its jobs, at once and without a word."""
        self._machines.pop(name).communicate(b"\n")

    def revive(self, name: str) -> None:
        """Starts a killed node again, and waits until it is idle."""
        self._start(name, "slurmd", "-D", "-N", name)
        self._until(lambda: self.nodes()[name] == "IDLE", f"{name} to be idle", 60)

    def clear(self) -> None:
        """Revives killed nodes, cancels all jobs and waits until all nodes are idle, for the next test."""
        for name in set(self.names) - set(self._machines):
            self._start(name, "slurmd", "-D", "-N", name)

        def quiet() -> bool:
            self.run("scancel", "--user=root")  # again and again: a batch script may requeue itself as it ends
            return not self.run("squeue", "--noheader") and self._idle()

        self._until(quiet, "the nodes to be idle", 60)

    def _idle(self) -> bool:
        with suppress(SlurmError):  # the controller is starting
            return set(self.nodes().values()) == {"IDLE"}
        return False

    def _configure(self, gpus: int, **settings: int) -> None:
        (self.folder / "state").mkdir(parents=True)
        (self.folder / "plugstack.conf").touch()
        devices = [self.folder / f"gpu{number}" for number in range(gpus)]
        for device in devices:
            device.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        controller_port, *ports = _free_ports(1 + len(self.names))
        host = socket.gethostname().partition(".")[0]
        node = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={}"
        nodes = "\n".join(node.format(name, host, port) for name, port in zip(self.names, ports, strict=True))
        config = CONFIG.format(
            folder=self.folder,
            host=host,
            controller_port=controller_port,
            nodes=nodes,
            gpus=gpus,
            first_job=random.randrange(1, 1_000_000),
            **settings,
        )
        (self.folder / "slurm.conf").write_text(config)

    def _start(self, name: str, *daemon: str) -> None:
        machine = [sys.executable, Path(__file__).with_name("machine.py"), *daemon]
        with open(self.folder / f"{name}.out", "ab") as out:
            self._machines[name] = subprocess.Popen(
                machine, stdin=subprocess.PIPE, stdout=out, stderr=out, env=self.environment, start_new_session=True
            )

    def _until(self, condition: Callable[[], bool], what: str, timeout: float, job: int | None = None) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise SlurmError(f"waited {timeout:.0f} s for {what}\n{self._told(job)}")
            time.sleep(0.2)

    def _told(self, job: int | None) -> str:
        """A job's fields and the end of its log; without one, the end of each daemon's."""
        if job is not None:
            return f"{self.state(job)}\n{_tail(self.log(job))}"
        logs = sorted(self.folder.glob("*.log")) or sorted(self.folder.glob("*.out"))
        return "\n".join(f"{path.name}:\n{_tail(path.read_text(errors='replace'))}" for path in logs)


def _outer(variable: str) -> bool:
    return variable.startswith(OUTER) or variable.lower().endswith("_proxy")


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-20:])


def _free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to outgoing connections, so that a killed node finds its own again, and
    above those of jobs."""
    free: list[int] = []
    for port in random.sample(range(30000, 32700), 1000):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            break
    return free


def missing() -> str:
    """Why there can be no cluster here; empty if there can be one."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: {INSTALL}"
    return "" if os.geteuid() == 0 else "a Slurm cluster with nodes of its own needs root"


def main() -> None:
    with Cluster(Path(tempfile.mkdtemp(prefix="slurm-"))) as cluster:
        print(f"{', '.join(cluster.names)} are idle; partitions normal and urgent; folder {cluster.folder}")
        subprocess.run(sys.argv[1:] or ["bash"], env=cluster.environment, cwd=cluster.folder)


if __name__ == "__main__":
    main()
