#!/usr/bin/env bash
# A TPU slice on Google Cloud: make it, train on all its hosts, go on after preemption, delete it.
#
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh run configs/NAME.py [overrides ...]      # again, to go on
#   launch/tpu_vm.sh resume configs/NAME.py [overrides ...]   # makes a preempted slice anew, then runs
#   launch/tpu_vm.sh delete
#
# --dry-run in front prints what would be run and runs nothing. Settings come from the environment:
#   NAME (v2t), ZONE (us-west4-a), TYPE (v5litepod-16), VERSION (v2-alpha-tpuv5-lite), SPOT (1; 0 is on demand),
#   BUCKET (required for run and resume): gs://BUCKET is mounted on every host and holds the work directory,
#   SOURCE (git+https address or wheel of v2t_jax that pip installs; required for create and resume).
#
# Cost, approximate, list prices of us-central1 as remembered in 2025, to be checked before use: chips x hours x
# 1.20 $ (v5e), 4.20 $ (v5p), 2.70 $ (v6e) on demand; spot about a third to a half. v5litepod-16 so costs about 19 $ an
# hour on demand. A slice costs money until it is deleted, also when idle.
# Time: about 5 minutes to create and install; then steps / steps a second, which the run shows.
# Not run yet on a TPU: checked by shellcheck and a dry run.
set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
action=${1:-}
[[ -n $action ]] || usage
shift
name=${NAME:-v2t} zone=${ZONE:-us-west4-a} type=${TYPE:-v5litepod-16} version=${VERSION:-v2-alpha-tpuv5-lite}

do_it() {
    if [[ -n $dry ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

everywhere() { # on all hosts at once, as JAX wants it
    do_it gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

create() {
    : "${SOURCE:?say what pip is to install as v2t_jax, such as git+https://HOST/OWNER/v2t_jax}"
    local spot=()
    [[ ${SPOT:-1} == 0 ]] || spot=(--spot)
    do_it gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" \
        --version="$version" "${spot[@]}"
    everywhere "python3 -m pip install -q 'v2t_jax[tpu] @ $SOURCE'"
}

run() {
    [[ $# -ge 1 ]] || usage
    : "${BUCKET:?name the bucket that holds the work directory}"
    local recipe=$1 words
    shift
    words=$(printf ' %q' "$@")
    [[ $# -gt 0 ]] || words=
    do_it gcloud compute tpus tpu-vm scp "$recipe" "$name:recipe.py" --zone="$zone" --worker=all
    # TPU metadata tells each process its place; SIGTERM at preemption makes all save and stop together.
    everywhere "mkdir -p ~/runs && (mountpoint -q ~/runs || gcsfuse --implicit-dirs '$BUCKET' ~/runs) && \
PATH=\$HOME/.local/bin:\$PATH v2t train recipe.py --workdir ~/runs/$name$words"
}

remove() {
    do_it gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet
}

case $action in
    create) create ;;
    run) run "$@" ;;
    resume)
        [[ $# -ge 1 ]] || usage
        state=PREEMPTED
        if [[ -z $dry ]]; then
            state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' || echo GONE)
        fi
        if [[ $state != READY ]]; then
            [[ $state == GONE ]] || remove # what is left of a preempted slice is in the way
            create
        fi
        run "$@"
        ;;
    delete) remove ;;
    *) usage ;;
esac
