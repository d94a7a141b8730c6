# shellcheck shell=bash
# What every job does, sourced by the sbatch scripts: plan, health check, start, and what follows from how it ended. README.md has the
# table of codes, files and signals. Values are only ever passed as words of an array: nothing here is built by pasting strings.
set -euo pipefail

REQUEUE=85 NEVER_AGAIN=93

say() { printf 'slurm: %s\n' "$*"; }
# refuse REASON: bad settings, which no restart repairs. 2 on a login node, and what stops a chain inside a job.
refuse() {
    printf 'slurm: error: %s\n' "$*" >&2
    if [[ -n ${SLURM_JOB_ID:-} ]]; then give_up "$*"; fi
    exit 2
}
# clean NAME VALUE...: control characters, newlines above all, are in no path or name that anybody means.
clean() {
    local name="$1" value
    shift
    for value in "$@"; do
        [[ $value != *[[:cntrl:]]* ]] || refuse "$name has a newline or another control character: $(printf '%q' "$value")"
    done
}
whole() { [[ $2 =~ ^[1-9][0-9]{0,6}$ ]] || refuse "$1 must be a whole number above 0, got $(printf '%q' "$2")"; }

# --- who and where ------------------------------------------------------------------------------------------------------------------

# header NAME: the value of #SBATCH --NAME=... in the script, for a dry run on a login node.
header() { sed -n "s/^#SBATCH --$1=//p" "$script" | head -n 1; }

# begin SCRIPT ARGUMENT...: read what the job was given. Sets nodes, per_node, ranks, restarts, dry_run and overrides.
begin() {
    script="$1" dry_run=no overrides=() directory=""
    shift
    if [[ ${1:-} == --dry-run ]]; then
        dry_run=yes
        shift
    fi
    overrides=("$@")
    clean "an argument" "$@"
    clean "the working directory" "$PWD"
    clean "the job's name" "${SLURM_JOB_NAME:-}" "${KD_CHAIN:-}"
    # Left over in the environment of who submits from inside a chain.
    [[ ${KD_CHAIN:-} == "${SLURM_JOB_NAME:-}" ]] || unset KD_CHAIN
    mounts=("$PWD")
    # shellcheck source=examples/slurm/cluster.sh
    source examples/slurm/cluster.sh
    clean "a setting of cluster.sh" "$KD_PYTHON" "$KD_CONTAINER" "$KD_IMAGE" "$KD_LAUNCHER" "${mounts[@]}"
    whole KD_MAX_FAILURES "$KD_MAX_FAILURES"
    whole KD_LEAD_SECONDS "$KD_LEAD_SECONDS"
    [[ $KD_EXPORT == yes || $KD_EXPORT == no ]] || refuse "KD_EXPORT must be yes or no, got $KD_EXPORT"
    [[ $KD_LAUNCHER == srun || $KD_LAUNCHER == torchrun ]] || refuse "KD_LAUNCHER must be srun or torchrun, got $KD_LAUNCHER"
    restarts="${SLURM_RESTART_COUNT:-0}"
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        [[ $dry_run == yes ]] || refuse "submit this from the repository's root: sbatch $script; or see what it would do: bash $script --dry-run"
        nodes="$(header nodes)" per_node="$(header ntasks-per-node)"
    else
        nodes="$SLURM_JOB_NUM_NODES" per_node="${SLURM_NTASKS_PER_NODE:-1}"
    fi
    nodes="${nodes:-1}" per_node="${per_node:-1}"
    ranks=$((nodes * per_node))
    [[ ${SLURM_NTASKS:-$ranks} == "$ranks" ]] ||
        refuse "Slurm gave $SLURM_NTASKS tasks for $nodes nodes of $per_node: say --nodes and --ntasks-per-node, not --ntasks"
    if [[ $dry_run == no ]]; then rendezvous; fi
    # The tasks get the signal too and save; this shell stays to see how they end.
    trap 'say "SIGTERM: waiting for the tasks to save"' TERM
    trap 'say "SIGUSR1 to the batch shell: waiting for the tasks"' USR1
}

# rendezvous: where the ranks meet. The port follows from the job, so that jobs that share a node do not share a port, and changes with
# every restart, so that a taken one is not met twice.
rendezvous() {
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    first_node="${hosts%%$'\n'*}"
    MASTER_ADDR="$first_node"
    if ! getent hosts "$MASTER_ADDR" >/dev/null; then # node names need not resolve: Slurm itself knows an address
        MASTER_ADDR="$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    fi
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 977 * restarts) % 30000))
    export MASTER_ADDR MASTER_PORT
}

# --- starting -----------------------------------------------------------------------------------------------------------------------

# container: sets `around`, the options of srun, and `inside`, the words before the program, for the container that cluster.sh chose.
container() {
    local mount joined="" binds=()
    around=() inside=()
    [[ $KD_CONTAINER == none ]] && return
    [[ -n $KD_IMAGE ]] || refuse "KD_CONTAINER=$KD_CONTAINER needs KD_IMAGE"
    for mount in "${mounts[@]}"; do
        [[ $mount != *[,:]* ]] || refuse "a path with ',' or ':' cannot be mounted: $mount"
        joined+="${joined:+,}$mount:$mount"
        binds+=(--bind "$mount:$mount")
    done
    case "$KD_CONTAINER" in
        pyxis) around=("--container-image=$KD_IMAGE" "--container-mounts=$joined" "--container-workdir=$PWD") ;;
        apptainer) inside=(apptainer exec --nv "${binds[@]}" --pwd "$PWD" "$KD_IMAGE") ;;
        *) refuse "KD_CONTAINER must be none, pyxis or apptainer, got $KD_CONTAINER" ;;
    esac
}

# one WORD...: a command on the first node, in the container. On a login node, in a dry run: here.
one() {
    container
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        [[ $KD_CONTAINER == none || -x $KD_PYTHON ]] || refuse "a dry run needs KD_PYTHON outside the container: set it for this command"
        "$@"
        return
    fi
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$first_node" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --mpi=none \
        "${around[@]}" "${inside[@]}" "$@"
}

# ranks_command WORD...: sets `command`: the program on all ranks, by the launcher that cluster.sh chose.
ranks_command() {
    local cpus="${SLURM_CPUS_PER_TASK:-1}" shared=(--mpi=none --kill-on-bad-exit=1 --wait=60 --label --unbuffered)
    container
    if [[ $KD_LAUNCHER == srun ]]; then
        command=(srun "--nodes=$nodes" "--ntasks=$ranks" "--ntasks-per-node=$per_node" "--cpus-per-task=$cpus" "${shared[@]}"
            "${around[@]}" "${inside[@]}" "$KD_PYTHON" "$@")
        return
    fi
    command=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 "--cpus-per-task=$((cpus * per_node))" "${shared[@]}"
        "${around[@]}" "${inside[@]}" "$KD_PYTHON" -m torch.distributed.run "--nnodes=$nodes" "--nproc-per-node=$per_node"
        --rdzv-backend=c10d "--rdzv-endpoint=${MASTER_ADDR:-FIRST_NODE}:${MASTER_PORT:-PORT}" "--rdzv-id=${SLURM_JOB_ID:-JOB}-$restarts"
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2" "$@")
}

# start: run `command`, keep what it prints in the job's log and in one of this attempt, and set `code`.
start() {
    local pid
    # tee outlives the signals that the tasks save at.
    "${command[@]}" > >(trap '' TERM USR1 USR2 && tee -a -- "$notes/job-$SLURM_JOB_ID-restart-$restarts.log") 2>&1 &
    pid=$!
    # A signal to this shell ends a wait, not the job.
    while true; do
        code=0
        wait "$pid" || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
}

# plan WORD...: print what the job is, then read `directory` and `tokenizer` as the program itself understands run file and overrides.
plan() {
    local found=() answer
    say "$nodes nodes x $per_node tasks = $ranks ranks, launcher $KD_LAUNCHER, container $KD_CONTAINER, restart $restarts"
    code=0
    answer="$(one "$KD_PYTHON" tools/check_run.py --ranks "$ranks" --print run.directory data.tokenizer "$@")" || code=$?
    if [[ $code -ne 0 ]]; then
        [[ $dry_run == yes || $code -ne 2 ]] || refuse "the run file, its overrides or its inputs cannot work; the reason is above"
        if [[ $dry_run == no ]]; then
            # Such as a file system that is away. There is no folder yet to count attempts in.
            ((restarts < KD_MAX_FAILURES)) || give_up "the run file could not be checked (code $code), at the restart $restarts"
            say "the run file could not be checked (code $code)"
            again
        fi
        # What would be started is shown all the same.
        trap 'exit 2' EXIT
        answer=RUN_DIRECTORY
    fi
    mapfile -t found <<<"$answer"
    directory="${found[0]}" tokenizer="${found[1]:-}"
}

# show TITLE: print `command` as it could be typed.
show() {
    printf 'slurm: %s:\n ' "$1"
    printf ' %q' "${command[@]}"
    printf '\n'
}

# healthy: all-reduce between all ranks, devices, disk and clocks, before hours are spent on them.
healthy() {
    [[ $KD_HEALTH_CHECK == yes ]] || return 0
    ranks_command tools/check_node.py --directory "$notes" --min-free-gb "$KD_MIN_FREE_GB" --exclude-file "$notes/exclude"
    show "health check"
    [[ $dry_run == yes ]] && return
    start
    [[ $code -eq 0 ]] || finish_attempt failed "the health check failed$(bad_nodes)"
}
bad_nodes() { [[ ! -s $notes/exclude ]] || printf '; to leave the bad nodes out: sbatch --exclude=%s ...' "$(<"$notes/exclude")"; }

# --- what follows from how it ended ---------------------------------------------------------------------------------------------------

# field NAME: of status.json, which rank 0 writes as a whole. Quotes inside its message are escaped, so they cannot end a name.
field() { [[ ! -r $directory/status.json ]] || sed -n "s/^ *\"$1\": *\"\{0,1\}\([a-z0-9]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$directory/status.json" | head -n 1; }

# progress: a number that grows as work is done: steps of a run, finished shards of a cache.
progress() {
    local shards=()
    case "$kind" in
        run) field step ;;
        cache) shopt -s nullglob; shards=("$output"/*.arrow); printf '%s\n' "${#shards[@]}" ;;
        other) printf '0\n' ;;
    esac
}

# judge CODE STATUS_BEFORE: what this attempt's end means, as a word. status.json is trusted before the launcher's exit code, which
# torchrun and --kill-on-bad-exit replace; a status that this attempt has not written says nothing about it.
judge() {
    local code="$1" before="$2" state=""
    if [[ $kind == run && -r $directory/status.json && $(<"$directory/status.json") != "$before" ]]; then state="$(field state)"; fi
    case "$state" in
        finished | requeue | stopped) printf '%s\n' "$state" && return ;;
    esac
    case "$code" in
        0) if [[ $kind == run ]]; then printf 'failed\n'; else printf 'finished\n'; fi ;;
        2 | "$NEVER_AGAIN") printf 'stopped\n' ;;
        "$REQUEUE") printf 'requeue\n' ;;
        *) printf 'failed\n' ;;
    esac
}

# stalled: unfinished attempts in a row, the last one included, that ended where they began, of this job or chain.
stalled() {
    local job from to word rest count=0
    while read -r job from to word rest; do
        [[ $word != finished && $job == "${KD_CHAIN:-$SLURM_JOB_ID}" ]] || continue
        if [[ $from == "$to" ]]; then count=$((count + 1)); else count=0; fi
    done <"$notes/history"
    printf '%s\n' "$count"
}

# finish_attempt WORD REASON: note it, then end the job, or give it back to Slurm to be started again.
finish_attempt() {
    local word="$1" reason="$2" step count
    step="$(progress)"
    printf '%s %s %s %s restart %s: %s\n' "${KD_CHAIN:-$SLURM_JOB_ID}" "$began" "${step:-0}" "$word" "$restarts" "$reason" >>"$notes/history"
    say "$word at ${step:-0}: $reason"
    case "$word" in
        finished) return 0 ;;
        stopped) give_up "$reason" ;;
    esac
    count="$(stalled)"
    if ((count >= KD_MAX_FAILURES)); then
        give_up "$count attempts in a row have brought it no further; see $notes"
    fi
    again
}

# give_up REASON: end so that nothing starts this again, and take the rest of a chain out of the queue.
give_up() {
    say "not to be started again: $1"
    if [[ -n ${KD_CHAIN:-} && -n ${notes:-} ]]; then printf '%s\n' "$KD_CHAIN" >"$notes/never-again"; fi
    end_chain
    exit "$NEVER_AGAIN"
}

# end_chain: take what is left of a chain out of the queue. chain.sh makes its name of letters that mean nothing to scancel.
end_chain() { [[ -z ${KD_CHAIN:-} ]] || scancel --state=PENDING --user="$(id -un)" --name="$KD_CHAIN" || true; }

# again: start this job once more. In a chain the next link does it.
again() {
    local state name="$SLURM_JOB_ID"
    [[ -z ${KD_CHAIN:-} ]] || exit "$REQUEUE"
    # The last task of an array has the array's own number: by it, all tasks would be meant.
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || name="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    # A job that was cancelled, or that Slurm requeues by itself, is no longer running: it is not brought back.
    state="$(squeue --noheader --format=%T --jobs="$name" || true)"
    if [[ $state == RUNNING ]]; then
        say "requeue"
        # Slurm ends this shell somewhere in here.
        scontrol requeue "$name" && sleep 60
    fi
    exit "$REQUEUE"
}

# --- kinds of jobs ------------------------------------------------------------------------------------------------------------------

# prepare KIND FOLDER: where this job keeps its logs and its history.
prepare() {
    kind="$1" notes="$2/slurm"
    mkdir -p -- "$notes"
    touch -- "$notes/history"
    began="$(progress)" began="${began:-0}"
    if [[ -n ${KD_CHAIN:-} && -r $notes/never-again && $(<"$notes/never-again") == "$KD_CHAIN" ]]; then
        give_up "an earlier link of this chain said so, see $notes/history"
    fi
}

# minutes_left: until KD_LEAD_SECONDS before the time limit, for torchrun, which kills workers half a minute after it passes a signal on.
minutes_left() {
    local end left
    end="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' | head -n 1)"
    [[ $end != Unknown && -n $end ]] || return 0
    left=$(($(date -d "$end" +%s) - $(date +%s) - KD_LEAD_SECONDS))
    ((left > 0)) || refuse "KD_LEAD_SECONDS ($KD_LEAD_SECONDS) is longer than the job's time limit"
    printf '%d.%02d\n' $((left / 60)) $((left % 60 * 100 / 60))
}

# train CONFIG EXPORT: the program until its run is finished; then, where EXPORT is not empty, its weights as a Hugging Face folder.
train() {
    local config="$1" export_to="$2" limit=() before="" minutes
    clean "a path" "$config" "$export_to"
    plan --config "$config" "${overrides[@]}"
    notes="$directory/slurm"
    if [[ $dry_run == no ]]; then
        prepare run "$directory"
        if [[ $KD_LAUNCHER == torchrun ]]; then
            minutes="$(minutes_left)"
            [[ -z $minutes ]] || limit=(--train.minutes "$minutes")
        fi
    fi
    healthy
    ranks_command -m megatron_kd.pretrain --config "$config" "${overrides[@]}" "${limit[@]}"
    show "training"
    if [[ $dry_run == no ]]; then
        if [[ -r $directory/status.json ]]; then before="$(<"$directory/status.json")"; fi
        start
        finish_attempt "$(judge "$code" "$before")" "the program ended with code $code"
    fi
    if [[ -n $export_to && $KD_EXPORT == yes ]]; then give_weights "$export_to"; fi
    if [[ $dry_run == no ]]; then end_chain; fi
}

# give_weights FOLDER: to transformers' format, unless an earlier attempt has done it.
give_weights() {
    local words=(tools/convert_checkpoint.py to-huggingface "$directory" --output "$1")
    if [[ -n $tokenizer ]]; then words+=(--tokenizer "$tokenizer"); fi
    command=("$KD_PYTHON" "${words[@]}")
    show "export"
    [[ $dry_run == no ]] || return 0
    if [[ -e $1 ]]; then
        say "kept from an earlier attempt: $1"
        return
    fi
    code=0
    one "${command[@]}" || code=$?
    [[ $code -eq 0 ]] || finish_attempt "$(kind=other judge "$code" "")" "the export ended with code $code"
}

# extract CONFIG OUTPUT: this array task's share of a teacher cache.
extract() {
    local config="$1" workers="${SLURM_ARRAY_TASK_COUNT:-1}" worker=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))
    output="$2"
    clean "a path" "$config" "$output"
    plan --extraction --config "$config" "${overrides[@]}"
    notes="$output/.work/task-$worker/slurm"
    if [[ $dry_run == no ]]; then prepare cache "$output/.work/task-$worker"; fi
    healthy
    ranks_command tools/cache_teacher.py --config "$config" --output "$output" --workers "$workers" --worker "$worker" "${overrides[@]}"
    show "extraction"
    [[ $dry_run == no ]] || return 0
    start
    finish_attempt "$(judge "$code" "")" "the extraction ended with code $code"
}

# once TITLE FOLDER WORD...: a program on all ranks, with the restarts of any other job; its notes go below FOLDER.
once() {
    local title="$1" folder="$2"
    shift 2
    clean "a path or an option" "$folder" "$@"
    if [[ $dry_run == no ]]; then prepare other "$folder"; fi
    ranks_command "$@"
    show "$title"
    [[ $dry_run == no ]] || return 0
    start
    finish_attempt "$(judge "$code" "")" "$title ended with code $code"
}
