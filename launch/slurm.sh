#!/usr/bin/env bash
#SBATCH --job-name=moon-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Runs training on SLURM, one task per GPU. All nodes must see the workdir: use a shared file system or gs://.
#
#   sbatch --nodes 4 launch/slurm.sh moon-jax train --config C --data D --workdir W
#   launch/slurm.sh --dry-run moon-jax train …          prints what it would run, and runs nothing
#
# Two minutes before the time limit, and on preemption, SLURM sends SIGTERM to all tasks. They save at the same step, and
# the job is requeued and resumes from there. Other failures are requeued too, except a user error (exit code 2), until
# the job was restarted RESTARTS times (default 20).
set -euo pipefail

die() { echo "launch/slurm.sh: $1" >&2; exit 2; }
dry=0
case ${1:-} in
  --dry-run) dry=1; shift ;;
  --help | -h) sed -n '9,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
  -*) die "$1: not understood; --help has examples" ;;
esac
[[ $# -gt 0 ]] || die "no command; --help has examples"

stopped=85  # exit code of the trainer if SIGTERM stopped it before it was done
step=(srun --kill-on-bad-exit=1 "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if (( dry )); then
  echo "MOON_JAX_STOP_CODE=$stopped ${step[*]@Q}"
  echo "${requeue[*]@Q}  # after $stopped, or a failure"
  exit 0
fi
command -v srun > /dev/null || die "no srun on this machine; submit this script with sbatch, on the cluster"

# The signal is meant for the tasks: this script and srun wait for them.
trap : TERM
code=0
MOON_JAX_STOP_CODE=$stopped "${step[@]}" || code=$?
# Exit code 2 is a user error: a restart would fail in the same way.
if (( code == stopped )) || { (( code && code != 2 )) && (( ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-20} )); }; then
  "${requeue[@]}"
fi
exit "$code"
