#!/usr/bin/env bash
# Starts several processes of one run on this machine: one per GPU, or several on CPUs.
#
#   launch/local.sh --processes 4 -- moon-jax train --config C --data D --workdir W
#   launch/local.sh --gpus 8 -- moon-jax train …        one process for each of eight GPUs
#   launch/local.sh --dry-run --processes 2 -- …        prints what it would start, and starts nothing
#
# If a process fails, the others are killed and all restart, at most --restarts times (default 3); the run resumes from
# its newest checkpoint. After a user error (exit code 2) nothing restarts. SIGTERM is forwarded: all processes save at
# the same step, and this script exits with 0. The processes connect through --port of this machine (default: random).
set -euo pipefail

processes=0 gpus=0 restarts=3 port=$((20000 + RANDOM % 10000)) dry=0
die() { echo "launch/local.sh: $1" >&2; exit 2; }
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --processes | --gpus | --restarts | --port)
      [[ ${2:-} =~ ^[0-9]+$ ]] || die "$1 ${2:-}: give a whole number"
      printf -v "${1#--}" %s "$2"
      shift 2 ;;
    --dry-run) dry=1; shift ;;
    --help | -h) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "$1: not understood; --help has examples" ;;
  esac
done
shift || true
[[ $# -gt 0 ]] || die "no command; give it after --"
(( gpus && processes )) && die "--processes and --gpus: give one of them"
processes=$(( processes + gpus ))
(( processes )) || die "--processes or --gpus is missing; --help has examples"

running=() stopped=0
forward() { stopped=1; kill -TERM "${running[@]}" 2>/dev/null || true; }
trap forward TERM INT

start() {  # one process; arguments: its number, then the command
  local number=$1 settings
  shift
  settings=(JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$number")
  if (( gpus )); then settings+=(CUDA_VISIBLE_DEVICES="$number"); fi
  if (( dry )); then
    echo "${settings[*]} ${*@Q}"
  else
    env "${settings[@]}" "$@" &
    running+=($!)
  fi
}

for (( attempt = 0; ; attempt++ )); do
  running=()
  for (( number = 0; number < processes; number++ )); do start "$number" "$@"; done
  (( dry )) && exit 0
  code=0 waited=0
  while (( ${#running[@]} )); do
    alive=()
    for process in "${running[@]}"; do
      if kill -0 "$process" 2>/dev/null; then
        alive+=("$process")
      else
        status=0
        { wait "$process"; } 2> /dev/null || status=$?  # hides bash's message about a killed process
        # A user error (2) of one process is the reason why the others failed.
        if (( status == 2 || ! code )); then code=$status; fi
      fi
    done
    # The other processes wait for a lost one: they get a second to print their errors. After a user error (2) most of
    # them report it and exit by themselves, which takes longer.
    if (( code )); then waited=$(( waited + 1 )); fi
    if (( ${#alive[@]} && waited > ( code == 2 ? 100 : 5 ) )); then
      kill -KILL "${alive[@]}" 2> /dev/null || true
    fi
    running=("${alive[@]}")
    sleep 0.2
  done
  # 126 and 127: the command cannot be run or was not found.
  (( code == 0 || code == 2 || code == 126 || code == 127 || stopped || attempt == restarts )) && exit "$code"
  echo "launch/local.sh: a process exited with $code; restarting all ($((attempt + 1)) of $restarts)" >&2
done
