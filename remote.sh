#!/usr/bin/env bash
# Train on a rented machine: copy code and data, install, train in tmux, bring the model home.
#   ./remote.sh 'ssh -p 40123 root@1.2.3.4' [--on-done CMD] -- --lora
# First comes the line that the provider shows, after -- the flags of train.py. Of data/ only train,
# val and persona are copied; a --model that is a folder is one on the box. Training needs no
# connection: neither Ctrl-C here nor a sleeping laptop stops it. The same command comes back to it,
# or resumes from the last checkpoint, on a new box too. --on-done CMD runs here once the model has
# loaded there and is here. BOX_FOLDER is the folder there (default: doppelganger).
set -euo pipefail
umask 077
say() { printf 'remote: %s\n' "$*"; }
fail() { printf '%s\n' "$@" >&2; exit 2; }
newest() { ls "$1" 2>/dev/null | grep -E '^step-[0-9]{8}$' | tail -n 1 || :; } # a checkpoint's name

# --- on the box: this script comes through ssh's stdin, with the name of a function to run

status() { # the run's state, exit code and newest checkpoint; then its flags
  local state=stopped
  if [ ! -e .run/flags ]; then state=none
  elif tmux has-session -t doppelganger 2>/dev/null; then state=running
  elif grep -qs '"result"' ckpt/run.json; then state=finished; fi
  echo "$state $(cat .run/exit 2>/dev/null || echo killed) $(newest ckpt/resume)"
  cat .run/flags 2>/dev/null || echo
}

check_box() { # before anything is sent
  cuda_wheels >/dev/null
  python3 -c 'import sys; assert sys.version_info >= (3, 11)' ||
    fail "The box has no Python 3.11 or newer" "Rent one with a newer image."
  type rsync tmux || { apt-get -qq update && apt-get -qq install -y rsync tmux python3-venv; } ||
    fail "The box has no rsync or no tmux" "Install them there: apt-get install rsync tmux"
  [ ! -e ckpt ] || mv ckpt "ckpt-before-$(date +%s)" # another run's, which may not be home yet
} >/dev/null

start() { # FLAGS
  mkdir -p .run
  rm -f .run/exit
  : >.run/log
  printf '%s\n' "$1" >.run/flags
  tmux new-session -d -s doppelganger "bash remote.sh --on-box . run"
}

run() { # in tmux
  trap : INT # Ctrl-C is for train.py, which saves
  set +e
  (set -e; prepare; train) 2>&1 | tee -i .run/log
  echo "${PIPESTATUS[0]}" >.run/exit
}

prepare() { # .venv: over the image's own torch where that works, else with a wheel for the driver
  ! cmp -s requirements.txt .venv/for || return 0
  rm -rf .venv
  if torch=$(works python3 2>/dev/null); then
    say "the image's torch works and is kept"
    python3 -m venv --system-site-packages .venv
    echo "$torch" >"$(echo .venv/lib/python3*/site-packages)/image.pth" # python3 may itself be a venv's
  else
    torch=$(grep '^torch==' requirements.txt)
    python3 -m venv .venv
    for cuda in $(cuda_wheels); do
      say "installing $torch+$cuda"
      index=https://download.pytorch.org/whl/$cuda
      .venv/bin/python -m pip install -q "$torch+$cuda" --index-url "$index" || continue
      ! works .venv/bin/python >/dev/null || break
    done
    works .venv/bin/python >/dev/null || fail "$torch doesn't compute there" \
      "Rent a box with a newer driver, or an image with a torch for its card."
  fi
  grep -v '^torch==' requirements.txt | .venv/bin/python -m pip install -q -r /dev/stdin
  cp requirements.txt .venv/for
}

cuda_wheels() { # of torch's, those for the driver, the best first: not every torch has each
  case $(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Z ]* Version *: *\([0-9.]*\).*/\1/p') in
    '') echo cpu ;;
    12.[0-7]) echo cu126 ;;
    12.*) echo cu128 cu126 ;;
    1[3-9].*) echo cu130 cu128 cu126 ;;
    *) fail "The box's NVIDIA driver is too old: it knows no CUDA 12" \
      "Rent one with CUDA 12.6 or newer." ;;
  esac
}

works() { # PYTHON: print where its torch lies, if that is new enough and computes on this GPU
  "$1" -c 'import os, sys, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11), torch.__version__
torch.ones(8, device="cpu" if sys.argv[1] == "cpu" else "cuda").sum().item()
print(os.path.dirname(os.path.dirname(torch.__file__)))' "$(cuda_wheels)"
}

train() { # LoRA takes one GPU: with a sharded base it would wait for the bus between several
  export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  eval "flags=($(cat .run/flags))"
  gpus=$(nvidia-smi -L 2>/dev/null | wc -l || :)
  case " ${flags[*]} " in *" --lora "* | *" --qlora "*) gpus=1 ;; esac
  if [ "$gpus" -gt 1 ]; then bash fsdp_launch.sh "${flags[@]}"; else python train.py "${flags[@]}"; fi
}

log() { # FROM SECONDS: print the log from a byte on, for so long or until the run ends
  if pid=$(tmux list-panes -t doppelganger -F '#{pane_pid}' 2>/dev/null); then
    timeout "$2" tail -c "+$1" --pid="$pid" -f .run/log || :
  else
    tail -c "+$1" .run/log
  fi
}

check_model() {
  .venv/bin/python -c 'from weights import devices, load
load.load_model("ckpt", device=devices.pick_device())'
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
out=${out%/}
key=$(printf '%q ' "${flags[@]}" --data data --out ckpt) # the flags there: the last of a kind counts
lora='' mine=''
case $key in *" --lora "* | *" --qlora "*) lora=yes ;; esac
[ "$(cat "$out/.remote" 2>/dev/null)" != "$key" ] || mine=yes
type rsync >/dev/null 2>&1 || fail "rsync is not installed here" "Install it: apt install rsync, or brew install rsync."
[ -f "$data/train.jsonl" ] ||
  fail "$data/train.jsonl is missing: there is nothing to train on" "Make it: python data.py result.json"
[ -n "$mine" ] || [ -z "$(ls -A "$out" 2>/dev/null)" ] ||
  fail "$out already holds something" "Name another with --out, or move that away."
if grep -qs '"result"' "$out/run.json"; then
  say "$out is finished, but a box that still runs bills. Talk to it: python chat.py $out"
  exit
fi

# --- the connection

here=$(cd "$(dirname "$0")" && pwd) folder=${BOX_FOLDER:-doppelganger} incoming=$out/.incoming last=''
tmp=$(mktemp -d /tmp/doppelganger.XXXXXX) # short: a socket's path must be
trap 'bash "$tmp/ssh" box -O exit >/dev/null 2>&1 || :; rm -rf "$tmp"; [ -z "$last" ] || say "$last"' EXIT
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
pull() { rsync -rtc --partial-dir=.incoming --exclude='*new*' -e "bash $tmp/ssh" "$@" || return 255; }
fetch_files() { # of ckpt/, whole and checked; run.json, which says that all is here, comes last
  mkdir -p "$incoming" && pull "box:$folder/ckpt/run.json" "$incoming/" &&
    pull --exclude=run.json "box:$folder/ckpt/*.*" "$out/" && mv -f "$incoming/run.json" "$out/"
}
fetch_checkpoint() { # the newest, if it isn't here; the one before goes when it is
  have=$(newest "$out/resume")
  [ "$save" != "$have" ] || return 0
  mkdir -p "$incoming/resume" "$out/resume" && fetch_files &&
    pull "box:$folder/ckpt/resume/$save" "$incoming/resume/" &&
    mv "$incoming/resume/$save" "$out/resume/" && rm -rf "$out/resume/${have:-none}" &&
    say "$save is home"
}
try() { # a first step: nothing has begun that could wait for a connection
  "$@" 2>"$tmp/error" && return
  [ $? != 2 ] || fail "$(tail -n 2 "$tmp/error")" # the box has said what is wrong
  fail "It can't be done there: $(tail -n 1 "$tmp/error")" "Does the box run, and is this the whole \
line (for direct ssh)? If another box had its address: ssh-keygen -R '[address]:port'"
}
retry() { # a later step: it waits for a connection (255 is ssh's code for none)
  until "$@" 2>"$tmp/error"; do
    [ $? = 255 ] || return 1
    say "no connection ($(tail -n 1 "$tmp/error")). Training goes on there; trying again" >&2
    sleep 5
  done
}

# --- the steps

try get_status
last="The box is billing."
if [ "$state" = running ]; then
  [ "$their_key" = "$key" ] ||
    fail "The box is busy with another run: train.py $their_key" "Wait, or end it there: tmux attach, Ctrl-C."
  say "back to the run that is there"
elif [ "$their_key" != "$key" ] || [ -z "$mine" ]; then
  try box check_box
  save=$(newest "$out/resume")
  [ -z "$save" ] || try push "$out" ckpt "*.* resume/$save"
  state=stopped
fi
mkdir -p "$out"
printf '%s\n' "$key" >"$out/.remote"
if [ "$state" = stopped ]; then
  say "copying the code and $data/"
  try push "$here" . '*.py exports/*.py exports/*.toml weights/*.py weights/*.toml training/*.py
    training/*.toml inference/*.py fsdp_launch.sh remote.sh requirements.txt'
  try push "$data" data '[t]rain.jsonl [v]al.jsonl [p]ersona.json' # patterns: one may be missing
  try box start "$key"
  say "training has begun there; Ctrl-C here doesn't stop it"
  state=running
fi
last="Training goes on there, and the box is still billing. The same command comes back to it."
while [ "$state" = running ]; do
  retry follow || :
  retry get_status ||
    fail "The box doesn't answer as before: $(tail -n 1 "$tmp/error")" "The same command tries again."
  [ -z "$lora" ] || [ "$state" != running ] || fetch_checkpoint 2>/dev/null || : # else next time
done
last="The box is still billing."
[ "$state" != none ] || fail "Nothing of this run is there any more" \
  "The same command begins again, from the last checkpoint that came home."
if [ "$state" = stopped ]; then
  [ -z "$lora" ] || retry fetch_checkpoint
  why="before its time (exit code $code): see above"
  [[ $code != 0 || $key != *" --max-minutes "* ]] || why="when --max-minutes were over, as planned"
  say "Training ended $why. The same command resumes it, from the last checkpoint if there is one."
  exit "${code/killed/1}"
fi
say "bringing it home"
retry box check_model ||
  fail "What training left doesn't load: $(tail -n 1 "$tmp/error")" "It is in $folder/ckpt there."
retry fetch_files
rm -rf "$incoming"
last="The box is still billing: destroy it."
say "$out is complete, and loads. Talk to it: python chat.py $out"
[ -z "$lora" ] || say "To merge there, with the base that is there: \
$ssh_line 'cd $folder && HF_HOME=\$PWD/.hub .venv/bin/python lora.py merge ckpt clone'"
[ -z "$on_done" ] || bash -c "$on_done" || { code=$?; say "--on-done ended with exit code $code"; exit "$code"; }
