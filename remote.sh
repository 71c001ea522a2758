#!/usr/bin/env bash
# Train on a rented machine: copy code and data, install, train in tmux, bring the model home.
#   ./remote.sh 'ssh -p 40123 root@1.2.3.4' [--on-done CMD] -- --lora
# First comes the line that the provider shows, after -- the flags of train.py. Of data/ only train,
# val and persona are copied; a --model that is a folder is one on the box. Training needs no
# connection: neither Ctrl-C here nor a sleeping laptop stops it. The same command comes back to it,
# or resumes from the last checkpoint, on a new box too. --on-done CMD runs here once the model is
# here. BOX_FOLDER is the folder there (default: doppelganger).
set -euo pipefail
umask 077
say() { printf 'remote: %s\n' "$*"; }
fail() { printf '%s\n' "$@" >&2; exit 2; }
newest() { ls "$1" 2>/dev/null | grep -E '^step-[0-9]{8}$' | tail -n 1 || :; } # a checkpoint's name
trains_adapter() { [[ " $* " == *" --lora "* || " $* " == *" --qlora "* ]]; }

# --- on the box: this script comes through ssh's stdin, with the name of a function to run

status() { # the run's state, exit code and newest checkpoint; then its flags
  local state=stopped
  if [ ! -e .run/flags ]; then state=none
  elif tmux has-session -t doppelganger 2>/dev/null; then state=running
  elif grep -qs '"result"' ckpt/run.json; then state=finished; fi
  echo "$state $(cat .run/exit 2>/dev/null || echo killed) $(newest ckpt/resume)"
  cat .run/flags 2>/dev/null || echo
}

check() { # before anything is sent
  cuda_wheels
  python3 -c 'import sys; assert sys.version_info >= (3, 11)' ||
    fail "The box has no Python 3.11 or newer" "Rent one with a newer image."
  # Triton compiles with gcc and Python.h; without them training is slower
  { type rsync tmux gcc g++ && ls "$(python3 -c "$PYTHON_H")"; } ||
    { apt-get -qq update && apt-get -qq install -y rsync tmux gcc g++ python3-dev python3-venv; } ||
    type rsync tmux ||
    fail "The box has no rsync or no tmux" "Install them there: apt-get install rsync tmux"
  [ ! -e ckpt ] || mv ckpt "ckpt-before-$(date +%s)" # another run's, which may not be home yet
} >/dev/null
PYTHON_H='import sysconfig; print(sysconfig.get_path("include") + "/Python.h")'

start() { # FLAGS
  mkdir -p .run
  rm -f .run/exit .run/log
  printf '%s\n' "$1" >.run/flags
  tmux new-session -d -s doppelganger "bash remote.sh --on-box . run"
}

run() { # in tmux
  trap : INT # Ctrl-C is for train.py, which saves
  set +e
  (set -e; prepare; train) 2>&1 | tee -i .run/log
  echo "${PIPESTATUS[0]}" >.run/exit
}

prepare() { # .venv: the image's own torch, where that works, else a wheel for the driver
  ! cmp -s requirements.txt .venv/for || return 0
  local torch wheel pip=(.venv/bin/python -m pip install -q)
  torch=$(grep '^torch==' requirements.txt)
  rm -rf .venv
  if python3 -c "$WORKS" 2>/dev/null; then
    say "the image's torch works and is kept"
    python3 -m venv --system-site-packages .venv
    # python3 may itself be a venv's, whose packages no other venv sees
    python3 -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
      >"$(echo .venv/lib/python3*/site-packages)/image.pth"
  else
    python3 -m venv .venv
    for wheel in $(cuda_wheels); do
      say "installing $torch+$wheel"
      "${pip[@]}" "$torch+$wheel" --index-url "https://download.pytorch.org/whl/$wheel" || continue
      ! .venv/bin/python -c "$WORKS" || break
    done
  fi
  .venv/bin/python -c "$WORKS" || fail "$torch doesn't compute there" \
    "Rent a box with a newer driver, or an image with a torch for its GPU."
  grep -v '^torch==' requirements.txt | "${pip[@]}" -r /dev/stdin
  cp requirements.txt .venv/for
}
WORKS='import shutil, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11), torch.__version__
torch.ones(8, device="cuda" if shutil.which("nvidia-smi") else "cpu").sum().item()'

cuda_wheels() { # of torch's, those for the driver, the best first: not every torch has each
  case $(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Z ]* Version *: *\([0-9.]*\).*/\1/p') in
    '') echo cpu ;;
    12.[0-7]) echo cu126 ;;
    12.*) echo cu128 cu126 ;; # driver 570; torch 2.11 is the last with cu128, which knows Blackwell
    1[3-9].*) echo cu130 cu128 cu126 ;; # driver 580, which PyPI's own wheel wants too
    *) fail "The box's NVIDIA driver is too old: it knows no CUDA 12" \
      "Rent one with driver 580 or newer (CUDA 13), or at least with CUDA 12.6." ;;
  esac
}

train() { # an adapter takes one GPU: with a sharded base it would wait for the bus between several
  export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  eval "flags=($(cat .run/flags))"
  local run=(python train.py)
  [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -lt 2 ] || trains_adapter "${flags[@]}" ||
    run=(bash fsdp_launch.sh)
  "${run[@]}" "${flags[@]}"
}

log() { # FROM SECONDS: print the log from a byte on, for so long or until the run (or no pid) ends
  local pid
  pid=$(tmux list-panes -t doppelganger -F '#{pane_pid}' 2>/dev/null) || pid=99999999
  timeout "$2" tail -c "+$1" --pid="$pid" -f .run/log || :
}

if [ "${1:-}" = --on-box ]; then
  mkdir -p "$2" && cd "$2" && shift 2
  export PATH=/venv/main/bin:/opt/conda/bin:$PATH HF_HOME=$PWD/.hub # where images have their python
  "$@"
  exit
fi

# --- at home: the arguments

ssh_line=${1:-} on_done='' data=data out=ckpt previous='' flags=(--resume)
if [ "${2:-}" = --on-done ]; then on_done=${3:-} && shift 2; fi
[[ $ssh_line == "ssh "* && ${2:-} == -- ]] ||
  fail "The line that the provider shows is needed, then --, then the flags of train.py:" \
    "./remote.sh 'ssh -p 40123 root@1.2.3.4' [--on-done CMD] -- --lora"
shift 2
for flag in "$@"; do
  case $previous in --data) data=$flag ;; --out) out=$flag ;; esac
  case $flag in --data=*) data=${flag#*=} ;; --out=*) out=${flag#*=} ;; esac
  [ "$flag" = --resume ] || flags+=("$flag")
  previous=$flag
done
out=${out%/} last='' begun=''
key=$(printf '%q ' "${flags[@]}" --data data --out ckpt) # the flags there: the last of a kind counts
mine=$(grep -sxF -- "$key" "$out/.remote" || :)          # out/ was begun by this command
type rsync >/dev/null 2>&1 ||
  fail "rsync is not installed here" "Install it: apt install rsync, or brew install rsync."
[ -f "$data/train.jsonl" ] ||
  fail "$data/train.jsonl is missing: there is nothing to train on" "Make it: python data.py EXPORT"
[ -n "$mine" ] || [ -z "$(ls -A "$out" 2>/dev/null)" ] ||
  fail "$out already holds something" "Name another with --out, or move that away."
if grep -qs '"result"' "$out/run.json"; then
  say "$out is finished, but a box that still runs bills. Talk to it: python chat.py $out"
  exit
fi

# --- the connection

here=$(cd "$(dirname "$0")" && pwd) folder=${BOX_FOLDER:-doppelganger}
tmp=$(mktemp -d /tmp/doppelganger.XXXXXX) # short: a socket's path must be
# The shared connection ends by itself, a minute after its last use: the end waits for nothing
trap 'rm -rf "$tmp"; [ -z "$last" ] || say "$last"' EXIT
trap 'echo; exit 130' INT
: >"$tmp/log"
cat >"$tmp/ssh" <<END
shift # rsync's name for the host; the provider's line has one
exec $ssh_line -T -o LogLevel=ERROR -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes \
  -o ConnectTimeout=20 -o ServerAliveInterval=15 \
  -o ControlMaster=auto -o ControlPath=$tmp/socket -o ControlPersist=60 "\$@"
END
box() { # FUNCTION ARGUMENTS: run it on the box
  bash "$tmp/ssh" box "bash -s -- --on-box $folder $(printf '%q ' "$@")" <"$here/remote.sh"
}
get_status() {
  box status >"$tmp/status" &&
    { read -r state code save && IFS= read -r their_key; } < <(tail -n 2 "$tmp/status")
}
follow() { box log "$((1 + $(wc -c <"$tmp/log")))" "${FETCH_SECONDS:-60}" | tee -a "$tmp/log"; }
push() ( # FROM TO PATTERNS: the files in a folder here that match → a folder on the box
  shopt -s nullglob
  cd "$1" && rsync -rLptzR -e "bash $tmp/ssh" $3 "box:$folder/$2/"
)
pull() { # PATH TO OPTIONS: from ckpt/ there into a folder here, whole and checked
  mkdir -p "$2" && rsync -rtc --partial-dir=.incoming --exclude='*new*' "${@:3}" \
    -e "bash $tmp/ssh" "box:$folder/ckpt/$1" "$2/" || return 255
}
fetch() { # run.json, which says that all is here, comes last
  pull run.json "$out/.incoming" && pull '*.*' "$out" --exclude=run.json &&
    mv -f "$out/.incoming/run.json" "$out/"
}
fetch_checkpoint() { # an adapter's newest, if it isn't here; the one before goes when it is
  local have
  have=$(newest "$out/resume")
  trains_adapter "${flags[@]}" && [ "$save" != "$have" ] || return 0
  mkdir -p "$out/resume" && fetch && pull "resume/$save" "$out/.incoming/resume" &&
    mv "$out/.incoming/resume/$save" "$out/resume/" && rm -rf "$out/resume/${have:-none}" &&
    say "$save is home"
}
try() { # once training has begun, wait for a connection (255 is ssh's code for none)
  local rc error
  until "$@" 2>"$tmp/error"; do
    rc=$? error=$(tail -n 1 "$tmp/error")
    [ $rc != 2 ] || fail "$(tail -n 2 "$tmp/error")" # the box has said what is wrong
    [ $rc = 255 ] && [ -n "$begun" ] ||
      fail "It can't be done there: $error" "Does the box run, and is this the whole line (for \
direct ssh)? If another box had its address: ssh-keygen -R '[address]:port'"
    say "no connection ($error). Training goes on there; trying again" >&2
    sleep 5
  done
}

# --- the steps

try get_status
last="The box is billing."
if [ "$state" = running ]; then
  [ "$their_key" = "$key" ] || fail "The box is busy with another run: train.py $their_key" \
    "Wait, or end it there: tmux attach, Ctrl-C."
  say "back to the run that is there"
elif [ "$their_key" != "$key" ] || [ -z "$mine" ]; then
  try box check
  save=$(newest "$out/resume")
  [ -z "$save" ] || try push "$out" ckpt "*.* resume/$save"
  state=stopped
fi
mkdir -p "$out"
printf '%s\n' "$key" >"$out/.remote"
if [ "$state" = stopped ]; then
  say "copying the code and $data/"
  try push "$here" . '*.[pc]* exports/*.[pt]* weights/*.[pt]* training/*.[pt]* inference/*.[pc]*
    fsdp_launch.sh remote.sh requirements.txt'
  try push "$data" data '[t]rain.jsonl [v]al.jsonl [p]ersona.json' # patterns: one may be missing
  try box start "$key"
  say "training has begun there; Ctrl-C here doesn't stop it"
  state=running
fi
begun=yes
last="Training goes on there, and the box is still billing. The same command comes back to it."
while [ "$state" = running ]; do
  try follow
  try get_status
  [ "$state" != running ] || fetch_checkpoint 2>/dev/null || : # else next time
done
last="The box is still billing."
case $state in
  none) fail "Nothing of this run is there any more" \
    "The same command begins again, from the last checkpoint that came home." ;;
  stopped)
    try fetch_checkpoint
    say "Training is not finished (exit code $code): see above. The same command resumes it."
    exit "${code/killed/1}" ;;
esac
say "bringing it home"
try fetch
rm -rf "$out/.incoming"
last="The box is still billing: destroy it."
say "$out is complete. Talk to it: python chat.py $out"
[ -z "$on_done" ] || bash -c "$on_done" ||
  { code=$?; say "--on-done ended with exit code $code"; exit "$code"; }
