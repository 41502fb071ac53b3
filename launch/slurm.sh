#!/usr/bin/env bash
#SBATCH --job-name=moon-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# A run on SLURM, a task for each GPU; the workdir must lie on a file system that all nodes share.
#
#   sbatch --nodes 4 launch/slurm.sh moon-jax train --config C --data D --workdir W
#   launch/slurm.sh --dry-run moon-jax train …          says what it would run, and runs nothing
#
# Two minutes before the time limit, and when the job is preempted, all tasks save at the same step, and the job is put
# back into the queue: it goes on from there. Any other failure is requeued too, RESTARTS times at most (default 3).
set -euo pipefail

dry=0
case ${1:-} in
  --dry-run) dry=1; shift ;;
  --help) sed -n '10,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
[[ $# -gt 0 ]] || { echo "launch/slurm.sh: no command; --help has examples" >&2; exit 2; }

step=(srun --kill-on-bad-exit=1 "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if (( dry )); then
  echo "${step[*]@Q}"
  echo "${requeue[*]@Q}  # after a SIGTERM, or a failure"
  exit 0
fi

stopped=0
"${step[@]}" &
running=$!
trap 'stopped=1; kill -TERM "$running"' TERM
code=0
wait "$running" || code=$?
if (( stopped )); then
  code=0
  wait "$running" || code=$?
fi
# 2 is a mistake of the user's: again it would fail again.
if (( stopped )) || { (( code && code != 2 )) && (( ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-3} )); }; then
  "${requeue[@]}"
fi
exit "$code"
