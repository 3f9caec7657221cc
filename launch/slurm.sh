#!/bin/bash
# Trains on several nodes of a SLURM cluster, from the root of the repository:
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh \
#     --config=experiments/configs/moe_1b.py --config.mesh.fsdp=8 \
#     --config.data.train=DIR --config.data.dev=DIR:dev --workdir=WORKDIR
#
# One task a node, which takes all of its devices; `experiments.train` finds the
# others from SLURM's variables. The folder of --workdir and the data must be
# seen by all nodes. PYTHON chooses the interpreter.
#
# Three minutes before the time is over every task gets SIGUSR1: it finishes the
# step, saves, and ends with code 3 (docs/exit_codes.md); the job is then queued
# again and goes on at the next batch.

#SBATCH --job-name=u2moe
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180

if [ $# -eq 0 ]; then
  echo 'usage: sbatch --nodes=N --gpus-per-node=G launch/slurm.sh FLAGS of experiments.train' >&2
  exit 2
fi
if [ -z "$SLURM_JOB_ID" ]; then
  echo 'launch/slurm.sh: no SLURM job; start it with sbatch' >&2
  exit 2
fi

# A task that ends first, when stopped, must not take the others with it before
# they have written their part; one that crashed takes them with it in the end.
srun --kill-on-bad-exit=0 --wait=600 \
  "${PYTHON:-python}" -m experiments.train "$@"
code=$?

if [ "$code" -eq 3 ]; then
  echo "stopped after saving; job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
