#!/usr/bin/env bash
# A run on Google Kubernetes Engine: a JobSet with a job for each TPU slice.
#
#   launch/gke.sh --name run1 --image IMAGE --accelerator tpu-v5p-slice --topology 4x4x4 --hosts 16 --claim shared -- \
#     moon-jax train --config C --data /shared/D --workdir /shared/W
#   launch/gke.sh --dry-run …                           prints the manifest, and sends nothing
#
# --hosts are those of one slice, --chips those of a host (default 4), --slices how many slices (default 1). IMAGE holds
# moon_jax[tpu,gcs]. --claim names a volume claim that all pods may write, mounted at /shared; W may be gs:// as well. A
# pod that is preempted saves and fails; the set is started again, --restarts times at most (default 20). --account is
# the pods' service account: what they may read and write is its permission, and no key is passed.
set -euo pipefail

# shellcheck disable=SC2034  # all are read by their names below
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

json() {  # the arguments as a JSON list, which is YAML too
  local list='' word
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//\$/\$\$}  # Kubernetes would put variables in
    [[ $word != *$'\n'* ]] || die "a word of the command holds a line break"
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
