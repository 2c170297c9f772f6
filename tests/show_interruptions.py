"""The losses of a Slurm job that nothing happens to, beside those of one that is pre-empted, loses a node and meets its
time limit: `python tests/show_interruptions.py` (root, Debian's slurmctld slurmd slurm-client; five minutes)."""

import sys
import tempfile
from pathlib import Path

from slurm.cluster import Cluster
from slurm.jobs import EVERY, LONG, Jobs

STEPS = 24


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="interruptions-"))
    with Cluster(folder / "cluster") as cluster:
        jobs = Jobs(cluster, folder)
        calm = jobs("calm", steps=STEPS)
        jobs.done(calm)
        job = jobs("disturbed", sbatch=("--time=2", "--signal=B:USR1@60"), steps=STEPS, STEP_SECONDS="3")
        jobs.reach("disturbed", 3)
        urgent = folder / "urgent.sh"
        urgent.write_text("#!/bin/sh\nsleep 3\n")
        jobs.done(cluster.submit(urgent, sbatch_flags=("--nodes=4", "--partition=urgent"), cwd=folder))
        jobs.reach("disturbed", EVERY + 2)
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.state(job)["NodeList"]).split()
        cluster.kill_node(nodes[1])
        cluster.wait(job, "COMPLETED", 2 * LONG)
        told = (folder / "outputs" / "disturbed" / "attempts.tsv").read_text()
        losses, disturbed = jobs.losses("calm"), jobs.losses("disturbed")
    print(told)
    print("step  undisturbed  disturbed  in attempts")
    for step, loss in losses.items():
        logs = sorted((folder / "outputs" / "disturbed" / "attempts").glob("*/rank-00000.log"))
        did = [log.parent.name for log in logs if f"step: {step:2}  loss" in log.read_text(errors="replace")]
        print(f"{step:4}  {loss:11.5f}  {disturbed[step]:9.5f}  {', '.join(did)}")
    same = losses == disturbed
    print("Equal in every step." if same else "DIFFERENT.")
    sys.exit(not same)


if __name__ == "__main__":
    main()
