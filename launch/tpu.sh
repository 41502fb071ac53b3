#!/usr/bin/env bash
# Runs training on TPU VMs: requests one or more slices as a queued resource, installs, trains on all hosts, deletes it.
#
#   launch/tpu.sh --name run1 --zone us-east5-a --type v5p-128 --spot -- moon-jax train --config C --data D --workdir W
#   launch/tpu.sh --name run1 --zone us-east5-a --type v5p-128 --slices 4 --spot -- …
#   launch/tpu.sh --dry-run …                           prints what it would do, and does nothing
#
# All hosts must see D (a mount of Filestore or of a bucket), and W, unless it is gs://bucket/run. --source: what pip
# installs (default: the public repository). A preempted slice is requested again, and after a lost process all restart,
# at most --restarts times (default 20); not after a user error (exit code 2). The run resumes from its newest
# checkpoint. Credentials are those of gcloud and of the VMs' service account; none is passed on.
set -euo pipefail

name='' zone='' type='' runtime='' slices=1 restarts=20 spot=0 dry=0
source='moon_jax[tpu,gcs] @ git+https://github.com/moon-jax/moon_jax'
die() { echo "launch/tpu.sh: $1" >&2; exit 2; }
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --name | --zone | --type | --runtime | --slices | --restarts | --source)
      [[ -n ${2:-} ]] || die "$1: give a value"
      printf -v "${1#--}" %s "$2"
      shift 2 ;;
    --spot) spot=1; shift ;;
    --dry-run) dry=1; shift ;;
    --help | -h) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "$1: not understood; --help has examples" ;;
  esac
done
shift || true
for one in name zone type; do [[ -n ${!one} ]] || die "--$one is missing; --help has examples"; done
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices $slices: give a whole number"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts $restarts: give a whole number"
[[ $# -gt 0 ]] || die "no command; give it after --"
case $type in
  v4-*) default=tpu-ubuntu2204-base ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  *) default='' ;;
esac
runtime=${runtime:-$default}
[[ -n $runtime ]] || die "--type $type: unknown runtime version; give --runtime"

run() { if (( dry )); then echo "${*@Q}"; else "$@"; fi; }

nodes=("$name")
create=(gcloud compute tpus queued-resources create "$name" --zone "$zone" --accelerator-type "$type"
  --runtime-version "$runtime")
if (( slices > 1 )); then
  create+=(--node-prefix "$name" --node-count "$slices")
  nodes=()
  for (( slice = 0; slice < slices; slice++ )); do nodes+=("$name-$slice"); done
else
  create+=(--node-id "$name")
fi
if (( spot )); then create+=(--spot); fi
discard=(gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet)

state() {
  gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)'
}

everywhere() {  # runs a command on all hosts of all slices; fails if any of them fails
  local node running=() code=0 status
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" --zone "$zone" --worker all --command "$1" &
    running+=($!)
    if (( dry )); then wait "$!"; fi
  done
  for node in "${running[@]}"; do
    status=0
    wait "$node" || status=$?
    if (( status == 2 || ! code )); then code=$status; fi  # a user error of one is why the others failed
  done
  return "$code"
}

# A run that was stopped by SIGTERM, as before a preemption, must not look like a finished one.
install="python3 -m venv ~/moon && ~/moon/bin/pip install -q ${source@Q}"
train="export PATH=~/moon/bin:\$PATH MOON_JAX_STOP_CODE=85; ${*@Q}"
if (( dry )); then
  run "${create[@]}"
  echo "# wait until ACTIVE; if FAILED or SUSPENDED, delete and request again"
  everywhere "$install"
  everywhere "$train"
  echo "# after a lost process: run both again; after a preemption: delete and start from the top"
  run "${discard[@]}"
  exit 0
fi

trap 'echo "launch/tpu.sh: $name may still exist and cost money; to delete it: ${discard[*]}" >&2; exit 130' INT TERM
code=1
for (( attempt = 0; attempt <= restarts; attempt++ )); do
  if (( attempt )); then echo "launch/tpu.sh: exited with $code; retrying ($attempt of $restarts)" >&2; fi
  if ! now=$(state 2> /dev/null); then
    "${create[@]}"
    now=WAITING
  fi
  until [[ $now == ACTIVE ]]; do
    if [[ $now =~ FAILED|SUSPENDED ]]; then
      echo "launch/tpu.sh: $name is $now" >&2
      "${discard[@]}" || true
      sleep "${POLL_SECONDS:-30}"
      continue 2
    fi
    sleep "${POLL_SECONDS:-30}"
    now=$(state || echo UNKNOWN)
  done
  code=0
  { everywhere "$install" && everywhere "$train"; } || code=$?
  (( code == 0 || code == 2 )) && break
  # A host may be lost before the state of its slice says so.
  sleep "${SETTLE_SECONDS:-120}"
done
"${discard[@]}" || true
exit "$code"
