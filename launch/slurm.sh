#!/usr/bin/env bash
#SBATCH --job-name=moon-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# A run on SLURM, a task for each GPU; the workdir must lie where all nodes see it: a shared file system, or gs://.
#
#   sbatch --nodes 4 launch/slurm.sh moon-jax train --config C --data D --workdir W
#   launch/slurm.sh --dry-run moon-jax train …          says what it would run, and runs nothing
#
# Two minutes before the time limit, and when the job is preempted, SLURM sends all tasks a SIGTERM: they save at the same
# step, and the job is put back into the queue and goes on from there. Any other failure but a mistake (exit code 2) is
# requeued too, until the job was restarted RESTARTS times (default 20).
set -euo pipefail

die() { echo "launch/slurm.sh: $1" >&2; exit 2; }
dry=0
case ${1:-} in
  --dry-run) dry=1; shift ;;
  --help | -h) sed -n '9,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
  -*) die "$1: not understood; --help has examples" ;;
esac
[[ $# -gt 0 ]] || die "no command; --help has examples"

stopped=85  # what the trainer shall end with after a SIGTERM, when it is not done
step=(srun --kill-on-bad-exit=1 "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if (( dry )); then
  echo "MOON_JAX_STOP_CODE=$stopped ${step[*]@Q}"
  echo "${requeue[*]@Q}  # after $stopped, or a failure"
  exit 0
fi
command -v srun > /dev/null || die "no srun here; hand this script to sbatch on a machine of the cluster"

# The signal is the tasks': this script, and srun, wait for them.
trap : TERM
code=0
MOON_JAX_STOP_CODE=$stopped "${step[@]}" || code=$?
# 2 is a mistake of the user's: again it would fail again.
if (( code == stopped )) || { (( code && code != 2 )) && (( ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-20} )); }; then
  "${requeue[@]}"
fi
exit "$code"
