#!/usr/bin/env bash
# Several processes of one run on this machine: one for each GPU, or several on CPUs.
#
#   launch/local.sh --processes 4 -- moon-jax train --config C --data D --workdir W
#   launch/local.sh --gpus 8 -- moon-jax train …        a process for each of eight GPUs
#   launch/local.sh --dry-run --processes 2 -- …        says what it would start, and starts nothing
#
# When one process is lost the others are ended, and all are started again, --restarts times at most (default 3): the
# run goes on from its newest checkpoint; not after a mistake (exit code 2). A SIGTERM is passed on: all save at the same
# step, and this ends with 0. They meet at a --port of this machine (default: any).
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
pass_on() { stopped=1; kill -TERM "${running[@]}" 2>/dev/null || true; }
trap pass_on TERM INT

start() {  # one process; the arguments are its number and the command
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
    for one in "${running[@]}"; do
      if kill -0 "$one" 2>/dev/null; then
        alive+=("$one")
      else
        ended=0
        { wait "$one"; } 2> /dev/null || ended=$?  # bash would tell of a kill
        # A mistake of one is why the others were lost.
        if (( ended == 2 || ! code )); then code=$ended; fi
      fi
    done
    # A lost process leaves the others waiting for it: they have a second to say what they know. A mistake of the user's
    # (2) most of them tell by themselves, and take longer for it.
    if (( code )); then waited=$(( waited + 1 )); fi
    if (( ${#alive[@]} && waited > ( code == 2 ? 100 : 5 ) )); then
      kill -KILL "${alive[@]}" 2> /dev/null || true
    fi
    running=("${alive[@]}")
    sleep 0.2
  done
  # 126 and 127: there is no such command.
  (( code == 0 || code == 2 || code == 126 || code == 127 || stopped || attempt == restarts )) && exit "$code"
  echo "launch/local.sh: a process ended with $code; starting all again ($((attempt + 1)) of $restarts)" >&2
done
