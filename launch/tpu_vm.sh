#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for them as a queued resource, installs, runs on all
# workers, follows, resumes after a preemption, and deletes what it created.
#
#   launch/tpu_vm.sh train --name=NAME --zone=ZONE --accelerator-type=v5litepod-16 --spot \
#     -- --config=configs/simclr.py:imagenet_r50 --workdir=gs://BUCKET/runs/r50
#
# Commands
#   train    all of it. Ctrl-C (or a closed laptop) leaves the run alone: the same
#            command follows it again.
#   create   ask for the TPU and wait for it       install  copy the checkout, install
#   run      start training on every worker        logs     follow the log of worker 0
#   status   state of the TPU and of the run       delete   the TPU and everything on it
# Options
#   --name --zone --accelerator-type   as gcloud takes them; --project, default gcloud's
#   --slices=N          N slices of that type (multislice); default 1
#   --spot              cheap, may be taken away; default on demand
#   --runtime-version   default by accelerator type
#   --create-flag=FLAG  another flag of "gcloud compute tpus queued-resources create",
#                       such as --create-flag=--reserved; may be repeated
#   --max-restarts=3    restarts in a row that brought no new checkpoint
#   --poll=20           seconds between two looks
#   --keep              do not delete at the end
#   --adopt             use the TPU named NAME although it is not of this workdir
#   --dry-run           print the exact commands, run none
#
# clj.main exits 0: complete; 75: start me again; 1 or anything else: yours to mend. It
# is started again on 75, on a process that a signal killed and on a lost TPU. Training
# is detached from the SSH connections, which may break. bash 3.2 (macOS) will do.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' accelerator_type='' project='' slices=1 spot='' runtime_version=''
max_restarts=3 poll=20 keep='' adopt='' dry_run='' workdir=''
train_args=() create_flags=()
created=''   # this process created the TPU
installed='' # this process installed on it
mine=''      # there is a TPU, and it is this run's
exec 3>&1    # commands of --dry-run, also from inside $(...)

say() { echo "${dry_run:+# }tpu_vm: $*"; }
die() {
  echo "tpu_vm: $*" >&2
  exit 1
}

# The one door to gcloud.
gc() {
  if [ -n "$dry_run" ]; then
    printf 'gcloud' >&3
    printf ' %q' "$@" >&3
    printf '\n' >&3
  else
    gcloud "$@" </dev/null
  fi
}
qr() {
  local verb=$1
  shift
  gc compute tpus queued-resources "$verb" "$name" "--zone=$zone" \
    ${project:+"--project=$project"} "$@"
}
nodes() {
  local i
  if [ "$slices" = 1 ]; then echo "$name"; else
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  fi
}
# on WORKER COMMAND: on that worker ("all") of every slice.
on() {
  local node status=0
  for node in $(nodes); do
    gc compute tpus tpu-vm ssh "$node" "--zone=$zone" ${project:+"--project=$project"} \
      "--worker=$1" --quiet '--ssh-flag=-o ServerAliveInterval=15' "--command=$2" ||
      status=$?
  done
  return "$status"
}

# --- the TPU -----------------------------------------------------------------------

# What marks a TPU as one of this workdir.
label() { printf '%s' "$workdir" | cksum | cut -d' ' -f1; }

# look: sets `state` (ABSENT where there is none) and `owner`, its label.
look() {
  local found error tries=0
  error=$(mktemp)
  while :; do
    if found=$(qr describe \
      '--format=value(state.state,tpu.nodeSpec[0].node.labels.clj_run)' 2>"$error"); then
      state=${found%%$'\t'*} owner=''
      case $found in *$'\t'*) owner=${found#*$'\t'} ;; esac
      break
    elif grep -qiE 'NOT_FOUND|was not found' "$error"; then
      state=ABSENT owner=''
      break
    elif [ $((tries += 1)) -ge 5 ]; then
      cat "$error" >&2
      die "cannot see the state of $name; is gcloud logged in?"
    fi
    sleep "$poll"
  done
  rm -f "$error"
  if [ -n "$dry_run" ]; then state=${created:+ACTIVE} && state=${state:-ABSENT}; fi
}

create_request() {
  local node=("--node-id=$name")
  [ "$slices" = 1 ] || node=("--node-count=$slices" "--node-prefix=$name")
  qr create "${node[@]}" "--accelerator-type=$accelerator_type" \
    "--runtime-version=$runtime_version" "--labels=clj_run=$(label)" \
    ${spot:+--spot} ${create_flags[@]+"${create_flags[@]}"} --quiet
}

# up: 0 once the TPU is ACTIVE, created if it was not there; 1 where the request failed
# or the TPU was taken away.
up() {
  local said=''
  while :; do
    look
    if [ "$state" != ABSENT ] && [ -z "$created$adopt" ] && [ "$owner" != "$(label)" ]; then
      die "$name exists and is not of this workdir; take another --name, or --adopt it"
    fi
    mine=yes
    [ "$state" != ABSENT ] || mine=''
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED) return 1 ;;
      ABSENT)
        say "asking for $name, $slices x $accelerator_type in $zone${spot:+, spot}"
        if create_request; then created=yes mine=yes; else
          look # another start may have been a moment faster
          [ "$state" != ABSENT ] || die "$name could not be created; nothing is left behind"
        fi
        continue
        ;;
    esac
    [ "$said" = "$state" ] || say "$name is $state"
    said=$state
    sleep "$poll"
  done
}

delete_tpu() {
  local tries=0
  until qr delete --force --quiet; do
    look
    [ "$state" != ABSENT ] || break
    [ $((tries += 1)) -lt 30 ] || die "$name could not be deleted and costs money"
    sleep "$poll"
  done
  created='' installed='' mine=''
  say "$name is deleted"
}

# --- the run on it -----------------------------------------------------------------

install() {
  local archive node
  archive=${TMPDIR:-/tmp}/clj-$name.tar.gz
  # With .git, so that config.json names the revision, but without its remotes.
  set -- env COPYFILE_DISABLE=1 tar -czf "$archive" -C "$root" --exclude=./.venv \
    --exclude=./runs --exclude=__pycache__ --exclude=./.git/config .
  if [ -n "$dry_run" ]; then printf '%q ' "$@" >&3 && echo >&3; else "$@"; fi
  for node in $(nodes); do
    gc compute tpus tpu-vm scp "$archive" "$node:clj.tar.gz" "--zone=$zone" \
      ${project:+"--project=$project"} --worker=all --quiet || return
  done
  # The image's own Python is older than clj needs.
  on all 'set -e; rm -rf clj clj-venv; mkdir clj; tar -xzf clj.tar.gz -C clj
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.12 clj-venv
python3 -m uv pip install --quiet --python clj-venv/bin/python -r clj/requirements.txt "jax[tpu]" gcsfs' ||
    return
  installed=yes
}

# A run leaves pid, log and exit (its code) in here; a reboot empties it.
run_dir=/tmp/clj-run

start() {
  local command
  command=$(printf ' %q' "${train_args[@]}")
  # What is left of an earlier start is ended first; the shell outlives the SIGTERM that
  # it shares with Python, to write the exit code down.
  on all "$(stop_command); mkdir -p $run_dir; cd clj
setsid nohup bash -c 'trap : TERM; \"\$@\"; echo \$? >$run_dir/exit' clj ~/clj-venv/bin/python -m clj.main$command >$run_dir/log 2>&1 </dev/null &
echo \$! >$run_dir/pid"
  log_lines=0
}
stop_command() {
  echo "if [ -f $run_dir/pid ]; then kill -TERM -\$(cat $run_dir/pid) 2>/dev/null && sleep 10; kill -KILL -\$(cat $run_dir/pid) 2>/dev/null; fi; rm -rf $run_dir"
}

# outcome: sets `verdict` to none (never started), running, ending (some workers have
# ended), an exit code of the run as a whole, or unreachable.
outcome() {
  local report code codes='' running='' none=''
  if ! report=$(on all "if [ -f $run_dir/exit ]; then echo clj-worker exit \$(cat $run_dir/exit)
elif [ ! -f $run_dir/pid ]; then echo clj-worker none
elif kill -0 \$(cat $run_dir/pid) 2>/dev/null; then echo clj-worker running
else echo clj-worker exit 137; fi" 2>/dev/null); then
    verdict=unreachable
    return
  fi
  if [ -n "$dry_run" ]; then
    verdict=none
    [ -z "$installed" ] || verdict=0
    return
  fi
  while read -r _ what code; do
    case $what in
      exit) codes="$codes $code" ;;
      running) running=yes ;;
      none) none=yes ;;
    esac
  done < <(grep '^clj-worker' <<<"$report" | tr -d '\r')
  verdict=0
  for code in $codes; do
    # What the user must mend outweighs what restarts, and that outweighs success.
    if [ "$code" = 0 ]; then
      continue
    elif [ "$code" = 75 ] || [ "$code" -ge 128 ]; then
      verdict=75
    else
      verdict=$code
      return
    fi
  done
  if [ -n "$running" ]; then
    verdict=running
    [ -z "$codes$none" ] || verdict=ending
  elif [ -n "$none" ]; then
    verdict=none
    [ -z "$codes" ] || verdict=75
  elif [ -z "$codes" ]; then
    verdict=unreachable
  fi
}

# show_log: of worker 0, from where it was left to the end of the run or the connection.
log_lines=0
show_log() {
  local line command node
  command="tail -n +$((log_lines + 1)) -f --pid=\$(cat $run_dir/pid) $run_dir/log"
  node=$(nodes | head -n 1)
  while IFS= read -r line; do
    printf '%s\n' "$line"
    log_lines=$((log_lines + 1))
  done < <(slices=1 name=$node on 0 "$command" 2>/dev/null)
}

# follow: until the run has ended; `verdict` is then its exit code, or lost.
follow() {
  local unreachable=0 ending=0
  while :; do
    show_log
    outcome
    case $verdict in
      running) unreachable=0 ;;
      ending)
        # The others hear of it within a minute, or are stuck.
        ending=$((ending + 1))
        if [ "$ending" -gt 9 ]; then
          verdict=75
          return
        fi
        ;;
      unreachable)
        look
        unreachable=$((unreachable + 1))
        if [ "$state" != ACTIVE ] || [ "$unreachable" -ge 5 ]; then
          verdict=lost
          return
        fi
        ;;
      none) # the host was rebooted
        verdict=75
        return
        ;;
      *) return ;;
    esac
    sleep "$poll"
  done
}

# Of the newest checkpoint; -1 where there is none.
newest_step() {
  local found
  found=$(gc storage ls "${workdir%/}/checkpoints/" 2>/dev/null |
    sed -n 's|.*/\([0-9][0-9]*\)/$|\1|p' | sort -n | tail -n 1) || true
  echo "${found:--1}"
}

train() {
  local best idle=0 step
  trap 'leave' EXIT
  trap 'exit 130' INT TERM HUP
  best=$(newest_step)
  while :; do
    if up; then
      outcome
      if [ "$verdict" = none ]; then
        verdict=75
        if { [ -n "$installed" ] || install; } && start; then follow; fi
      else
        follow
      fi
      # Also where it was noticed during the install or the start.
      if [ "$verdict" = 75 ]; then
        look
        [ "$state" = ACTIVE ] || verdict=lost
      fi
    else
      verdict=lost
    fi
    case $verdict in
      75 | lost) ;;
      *) break ;;
    esac
    step=$(newest_step)
    if [ "$step" -gt "$best" ]; then best=$step idle=0; else idle=$((idle + 1)); fi
    if [ "$idle" -gt "$max_restarts" ]; then
      say "$max_restarts restarts in a row brought no checkpoint after step $best"
      verdict=1
      break
    fi
    if [ "$verdict" = lost ]; then
      say "$name is lost ($state); asking for another, to go on from step $best"
      delete_tpu
    else
      say "starting again from step $best"
      on all "$(stop_command)" || true
    fi
  done
  if [ "$verdict" = 0 ]; then say "complete: $workdir"; else
    say "stopped with exit code $verdict; the last lines of each worker:"
    on all "tail -n 20 $run_dir/log" || true
  fi
  if [ -n "$keep" ]; then say "$name is kept; it costs money until you delete it"; else
    delete_tpu
  fi
  trap - EXIT
  [ "$verdict" = 0 ] || exit 1
}

# Whatever ends `train` early leaves the TPU alone, and says so.
leave() {
  [ -n "$mine" ] || return 0
  echo "tpu_vm: $name was left as it is; the same command goes on, and this ends it:" >&2
  echo "  $0 delete --name=$name --zone=$zone${project:+ --project=$project}" >&2
}

# --- the command line --------------------------------------------------------------

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0" && exit 1; }
command=$1
shift
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --accelerator-type=*) accelerator_type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --runtime-version=*) runtime_version=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --spot) spot=yes ;;
    --keep) keep=yes ;;
    --adopt) adopt=yes ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      train_args=("$@")
      break
      ;;
    *) die "unknown option $1; clj.main's own options come after --" ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || die "give --name= and --zone="
for arg in ${train_args[@]+"${train_args[@]}"}; do
  case $arg in --workdir=*) workdir=${arg#*=} ;; esac
done
case $command in
  train | create)
    case $accelerator_type in
      '') die "give --accelerator-type=, such as v5litepod-16" ;;
      v2-* | v3-* | v4-*) : "${runtime_version:=tpu-ubuntu2204-base}" ;;
      v5litepod-*) : "${runtime_version:=v2-alpha-tpuv5-lite}" ;;
      v5p-*) : "${runtime_version:=v2-alpha-tpuv5}" ;;
      v6e-*) : "${runtime_version:=v2-alpha-tpuv6e}" ;;
      *) [ -n "$runtime_version" ] || die "give --runtime-version= for $accelerator_type" ;;
    esac
    ;;
esac
case $command in
  train | create | run)
    case $workdir in
      gs://*) ;;
      *) die "give -- --workdir=gs://BUCKET/DIR: a TPU's own disk goes with it" ;;
    esac
    ;;
esac
case $command in
  train) train ;;
  create) up || die "$name is $state; delete it and create it again" ;;
  install) install ;;
  run)
    outcome
    [ "$verdict" != running ] || die "a run is going on on $name; see: $0 logs"
    start
    ;;
  logs) show_log ;;
  status)
    look
    say "$name is $state"
    [ "$state" != ACTIVE ] || { outcome && say "the run: $verdict"; }
    ;;
  delete) delete_tpu ;;
  *) die "unknown command $command; there are train, create, install, run, logs, status, delete" ;;
esac
