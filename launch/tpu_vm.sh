#!/usr/bin/env bash
# A TPU slice on Google Cloud: create it, train on all its hosts, resume after preemption, delete it.
#
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh run configs/NAME.py [overrides ...]      # again, to resume
#   launch/tpu_vm.sh resume configs/NAME.py [overrides ...]   # recreates a preempted slice, then runs
#   launch/tpu_vm.sh delete
#
# --dry-run in front prints the commands and runs nothing; names that aren't set are printed as placeholders. Settings
# come from the environment:
#   NAME (v2t), ZONE (us-west4-a), TYPE (v5litepod-16), VERSION (v2-alpha-tpuv5-lite), SPOT (1; 0 is on demand),
#   BUCKET (required for run and resume): gs://BUCKET is mounted on every host and is the current folder of the run, so
#     that data/ and runs/ in recipes lie there; the work directory is runs/ and the recipe's name,
#   SOURCE (git+https address or wheel of v2t_jax for pip; required for create and resume),
#   PYTHON (3.11): of the virtual environment on the hosts, whose own Python may be older; uv installs it.
# The recipe's whole folder is copied to every host, because recipes import their siblings.
#
# Cost, approximate, list prices of us-central1 as remembered in 2025, check them before use: chips x hours x 1.20 $
# (v5e), 4.20 $ (v5p), 2.70 $ (v6e) on demand; spot about a third to a half. v5litepod-16 costs about 19 $ an hour on
# demand. A slice costs money until it is deleted, also when idle.
# Time: about 5 minutes to create and install; then steps / steps a second, which the run shows.
# Not run yet on a TPU: checked by shellcheck and a dry run.
set -euo pipefail

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
    BUCKET=${BUCKET:-BUCKET} SOURCE=${SOURCE:-SOURCE}
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

everywhere() { # on all hosts at once, as JAX needs it
    do_it gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

create() {
    : "${SOURCE:?is what pip installs as v2t_jax, such as git+https://HOST/OWNER/v2t_jax}"
    local spot=()
    [[ ${SPOT:-1} == 0 ]] || spot=(--spot)
    do_it gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" \
        --version="$version" "${spot[@]}"
    everywhere "python3 -m pip install -q uv && python3 -m uv venv -q --python ${PYTHON:-3.11} ~/venv && \
python3 -m uv pip install -q --python ~/venv/bin/python 'v2t_jax[tpu] @ $SOURCE'"
}

run() {
    [[ $# -ge 1 ]] || usage
    : "${BUCKET:?is the bucket that holds the work directory}"
    local folder recipe words
    [[ -f $1 ]] || { echo "There is no recipe at $1; give the path of a file such as configs/tiny.py." >&2; exit 2; }
    folder=$(realpath "$(dirname "$1")") recipe=$(basename "$1")
    words=$(printf ' %q' "${@:2}")
    [[ $# -gt 1 ]] || words=
    everywhere "rm -rf ~/recipes && mkdir ~/recipes"
    do_it gcloud compute tpus tpu-vm scp --recurse "$folder" "$name:recipes" --zone="$zone" --worker=all
    # TPU metadata tells each process its place; SIGTERM at preemption makes all save and stop together.
    everywhere "mkdir -p ~/bucket && (mountpoint -q ~/bucket || gcsfuse --implicit-dirs '$BUCKET' ~/bucket) && \
cd ~/bucket && ~/venv/bin/v2t train ~/recipes/$(printf %q "$(basename "$folder")/$recipe") \
--workdir $(printf %q "runs/${recipe%.py}")$words"
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
