#!/usr/bin/env bash
# Runs training on Google Kubernetes Engine, as a JobSet with one job per TPU slice.
#
#   launch/gke.sh --name run1 --image IMAGE --accelerator tpu-v5p-slice --topology 4x4x4 --hosts 16 --claim shared -- \
#     moon-jax train --config C --data /shared/D --workdir /shared/W
#   launch/gke.sh --dry-run …                           prints the manifest and submits nothing
#
# --hosts: hosts per slice. --chips: chips per host (default 4). --slices: number of slices (default 1). IMAGE must
# contain moon_jax[tpu,gcs]. --claim: a volume claim that all pods can write, mounted at /shared; W may also be gs://. A
# preempted pod saves and fails, and the set restarts, at most --restarts times (default 20). --account: the pods'
# service account; its permissions decide what they can read and write, and no key is passed.
set -euo pipefail

# shellcheck disable=SC2034  # all are read indirectly, by name, below
name='' image='' accelerator='' topology='' hosts='' claim='' chips=4 slices=1 restarts=20 account=default dry=0
die() { echo "launch/gke.sh: $1" >&2; exit 2; }
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --name | --image | --accelerator | --topology | --hosts | --claim | --chips | --slices | --restarts | --account)
      [[ -n ${2:-} ]] || die "$1: give a value"
      [[ $2 =~ ^[A-Za-z0-9._:/@-]+$ ]] || die "$1 $2: letters, digits and ._:/@- only"
      printf -v "${1#--}" %s "$2"
      shift 2 ;;
    --dry-run) dry=1; shift ;;
    --help | -h) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "$1: not understood; --help has examples" ;;
  esac
done
shift || true
for one in name image accelerator topology hosts claim; do
  [[ -n ${!one} ]] || die "--$one is missing; --help has examples"
done
for one in hosts chips slices restarts; do [[ ${!one} =~ ^[0-9]+$ ]] || die "--$one ${!one}: give a whole number"; done
[[ $# -gt 0 ]] || die "no command; give it after --"

json() {  # the arguments as a JSON list, which is also YAML
  local list='' word
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//\$/\$\$}  # otherwise Kubernetes would substitute variables
    [[ $word != *$'\n'* ]] || die "an argument of the command contains a line break; remove it"
    list+="${list:+, }\"$word\""
  done
  echo "[$list]"
}

manifest=$(< "$(dirname "$0")/jobset.yaml")
# shellcheck disable=SC2034
command=$(json "$@")
for one in name image accelerator topology hosts claim chips slices restarts account command; do
  manifest=${manifest//"@${one^^}@"/"${!one}"}
done
if (( dry )); then echo "$manifest"; else kubectl apply -f - <<< "$manifest"; fi
