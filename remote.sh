#!/usr/bin/env bash
# Train on a rented machine, with the line that its provider shows; what follows -- are train.py's flags:
#   ./remote.sh 'ssh -p 40123 root@1.2.3.4' [--on-done CMD] -- --lora
# Only the code and data/'s train, val and persona go there; a --model that is a folder is one of the box's. Training does without us:
# Ctrl-C, or a laptop that sleeps, ends nothing. The same command comes back to it, or goes on from the last save, on a new box too.
# --on-done CMD runs here, once the model has loaded there and is here byte for byte. BOX_FOLDER: the folder there (doppelganger).
# shellcheck disable=SC2012,SC2086,SC2317 # our own files' names have no spaces; the box's half is called by name
set -euo pipefail
umask 077
say() { printf 'remote: %s\n' "$*"; }
fail() { printf '%s\n' "$@" >&2; exit 2; }
sums() { (cd "$1" && cksum -- *.safetensors | LC_ALL=C sort); }
newest() { ls -d "$1"/step-???????? 2>/dev/null | sed -n '$s|.*/||p' || :; } # the newest whole save in a folder

# --- on the box: home sends this file through ssh, and names the function
look() { # → the run's state, its exit code, rsync or tar, its newest save; and its flags
  local state=stopped
  if [ ! -e .run/flags ]; then state=none
  elif ! flock -sn .run/lock true; then state=alive
  elif grep -qs '"result"' ckpt/run.json; then state=ready; fi
  echo "$state $(cat .run/exit 2>/dev/null || echo killed) $(command -v rsync >/dev/null && echo rsync || echo tar) $(newest ckpt/resume)"
  cat .run/flags 2>/dev/null || echo
}
make_room() { # for a run, if it can be here
  wheel >/dev/null
  python3 -c 'import sys; assert sys.version_info >= (3, 11)' || fail "The box has no Python 3.11 or newer" "Rent one with a newer image."
  [ ! -e ckpt ] || mv ckpt "ckpt-before-$(date +%s)" # another run's: it may not have come home yet
}
wheel() { # of torch's, those for the driver, the best first: not every torch has each
  case $(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Z ]* Version *: *\([0-9.]*\).*/\1/p') in
    '') echo cpu ;; 12.[0-7]) echo cu126 ;; 12.*) echo cu128 cu126 ;; 1[3-9].*) echo cu130 cu128 cu126 ;;
    *) fail "The box's NVIDIA driver is too old: it knows no CUDA 12" "Rent one with CUDA 12.6 or newer." ;;
  esac
}
start() { # FLAGS
  mkdir -p .run && rm -f .run/exit .run/log
  printf '%s\n' "$1" >.run/flags
  command -v tmux || { apt-get -qq update && apt-get -qq install -y tmux python3-venv; } || :
  tmux new-session -d -s doppelganger "bash remote.sh --on-box . run" || setsid nohup bash remote.sh --on-box . run </dev/null &
  timeout 60 bash -c 'until [ -e .run/log ]; do sleep 0.1; done'
} >/dev/null 2>&1 # or ssh would wait for the end of what was started
run() {
  exec 9>.run/lock && flock -w 10 9 # held as long as any process of the run lives
  trap : INT # it is for train.py, which saves
  set +e
  (set -e; prepare; train) 2>&1 | tee -i .run/log
  echo "${PIPESTATUS[0]}" >.run/exit
}
prepare() { # .venv: over the image's own torch where that works, else with the wheel for the driver
  ! cmp -s requirements.txt .venv/for || return 0
  rm -rf .venv
  if torch=$(works python3 2>/dev/null); then
    say "the image's torch works and is kept"
    python3 -m venv --system-site-packages .venv
    echo "$torch" >"$(echo .venv/lib/python3*/site-packages)/image.pth" # python3 may itself be a venv's
  else
    torch=$(grep '^torch==' requirements.txt)
    python3 -m venv .venv
    for cuda in $(wheel); do
      say "installing $torch+$cuda"
      .venv/bin/python -m pip install -q "$torch+$cuda" --index-url "https://download.pytorch.org/whl/$cuda" || continue
      ! works .venv/bin/python >/dev/null || break
    done
    works .venv/bin/python >/dev/null || fail "$torch doesn't compute there" "Rent a box with a newer driver, or an image with a torch for its card."
  fi
  grep -v '^torch==' requirements.txt | .venv/bin/python -m pip install -q -r /dev/stdin
  cp requirements.txt .venv/for
}
works() { # PYTHON → where its torch lies, if that is new enough and computes on this card
  "$1" -c 'import os, sys, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11), torch.__version__
torch.ones(8, device="cpu" if sys.argv[1] == "cpu" else "cuda").sum().item()
print(os.path.dirname(os.path.dirname(torch.__file__)))' "$(wheel)"
}
train() { # a LoRA on one GPU: over a sharded base it would wait for the bus between them
  export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  eval "flags=($(cat .run/flags))"
  case " ${flags[*]} " in *" --lora "* | *" --qlora "*) gpus=1 ;; *) gpus=$(nvidia-smi -L 2>/dev/null | wc -l || :) ;; esac
  if [ "$gpus" -gt 1 ]; then bash fsdp_launch.sh "${flags[@]}"; else python train.py "${flags[@]}"; fi
}
log() { # FROM SECONDS: the log from a byte on, so long, or until the run ends
  timeout "$2" flock -s .run/lock true >/dev/null 2>&1 &
  tail -c "+$1" --pid=$! -f .run/log
}
check() { # load what training left → the sums of what home must have
  .venv/bin/python -c 'import checkpoint; checkpoint.load_model("ckpt", device=checkpoint.pick_device())' >&2
  sums ckpt
}
if [ "${1:-}" = --on-box ]; then
  mkdir -p "$2" && cd "$2" && shift 2
  PATH=/venv/main/bin:/opt/conda/bin:$PATH HF_HOME=$PWD/.hub "$@" # where images have their python, and ssh doesn't look
  exit
fi

# --- at home: what was asked
line=${1:-} on_done='' data=data out=ckpt lora='' previous='' last='' flags=(--resume)
if [ "${2:-}" = --on-done ]; then on_done=${3:-} && shift 2; fi
[[ $line == "ssh "* && ${2:-} == -- ]] || fail "The line that the provider shows is needed, then --, then the flags of train.py:" \
  "./remote.sh 'ssh -p 40123 root@1.2.3.4' [--on-done CMD] -- --lora"
shift 2
for flag in "$@"; do
  case $previous in --data) data=$flag ;; --out) out=${flag%/} ;; esac
  case $flag in --data=* | --out=*) fail "$flag: two words are needed" "${flag%%=*} ${flag#*=}" ;; esac
  [ "$flag" = --resume ] || flags+=("$flag")
  previous=$flag
done
key=$(printf '%q ' "${flags[@]}" --data data --out ckpt) # there; the last of a flag counts
case $key in *" --lora "* | *" --qlora "*) lora=yes ;; esac
mine=$([ "$(cat "$out/.remote" 2>/dev/null)" != "$key" ] || echo yes)
[ -f "$data/train.jsonl" ] || fail "$data/train.jsonl is missing: there is nothing to train on" "Make it: python data.py result.json"
[ -n "$mine" ] || [ -z "$(ls -A "$out" 2>/dev/null)" ] || fail "$out already holds something" "Name another with --out, or move that away."
if grep -qs '"result"' "$out/run.json"; then
  say "$out is finished: nothing is left to do here, but a box that still runs bills. Talk to it: python chat.py $out"
  exit
fi

# --- the ways to the box
here=$(cd "$(dirname "$0")" && pwd) folder=${BOX_FOLDER:-doppelganger} in=$out/.incoming
tmp=$(mktemp -d /tmp/doppelganger.XXXXXX) && : >"$tmp/log" # short: a socket's path must be
trap 'bash "$tmp/ssh" box -O exit >/dev/null 2>&1 || :; rm -rf "$tmp"; [ -z "$last" ] || say "$last"' EXIT
trap 'echo; exit 130' INT
cat >"$tmp/ssh" <<END
shift # rsync names a host; the line has one
exec $line -T -o LogLevel=ERROR -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes -o ConnectTimeout=20 \
  -o ServerAliveInterval=15 -o ControlMaster=auto -o ControlPath=$tmp/socket -o ControlPersist=60 "\$@"
END
there() { bash "$tmp/ssh" box "$@"; }
box() { there "bash -s -- --on-box $folder $(printf '%q ' "$@")" <"$here/remote.sh"; }
status() { box look >"$tmp/look" && { read -r state code copies save && IFS= read -r theirs; } < <(tail -n 2 "$tmp/look"); }
follow() { box log "$((1 + $(wc -c <"$tmp/log")))" "${FETCH_SECONDS:-60}" | tee -a "$tmp/log"; }
rsyncs() { [ "$copies" = rsync ] && command -v rsync >/dev/null; }
push() ( # FROM TO NAMES: those of the names that are in a folder here → a folder there
  cd "$1" || exit
  names=$(ls -d $3 2>/dev/null || :)
  if rsyncs; then rsync -rLptRz -e "bash $tmp/ssh" $names "box:$folder/$2/"
  else COPYFILE_DISABLE=1 tar -chzf - $names | there "umask 077; mkdir -p $folder/$2; tar -C $folder/$2 --no-same-owner -xzf -"; fi
)
pull() { # SAVE or '': the model, the notes, and that save → a folder beside, where all is whole if this succeeds
  if rsyncs; then rsync -rtR --partial --exclude='*new*' -e "bash $tmp/ssh" "box:$folder/ckpt/./*.*" ${1:+"box:$folder/ckpt/./resume/$1"} "$in/"
  else there "cd $folder/ckpt; tar --exclude='*new*' -cf - *.* ${1:+resume/$1} || [ \$? = 1 ]" | tar -C "$in" -xf -; fi || return 255
  [ -z "$1" ] || there test -d "$folder/ckpt/resume/$1" || return 255 # train.py dropped it meanwhile: the next one, then
}
save_home() { # the newest save, if it isn't there; the one before goes when it is
  have=$(newest "$out/resume")
  [ "$save" != "$have" ] || return 0
  pull "$save" || return
  mkdir -p "$out/resume"
  mv -f "$in"/*.* "$out/" && mv "$in/resume/$save" "$out/resume/" && rm -rf "$out/resume/${have:-none}"
  say "$save is home"
}
try() { # a step that is nothing without the box
  "$@" 2>"$tmp/error" && return
  [ $? != 2 ] || fail "$(tail -n 2 "$tmp/error")" # the box has said what is wrong
  fail "It can't be done there: $(tail -n 1 "$tmp/error")" \
    "Does the box run, and is this the whole line (for direct ssh)? If another box had its address: ssh-keygen -R '[address]:port'"
}
await() { # a step that can wait for a connection (255 is ssh's word for none)
  until "$@" 2>"$tmp/error"; do
    [ $? = 255 ] || return 1
    say "no connection ($(tail -n 1 "$tmp/error")). Training goes on there; trying again" >&2
    sleep 5
  done
}

# --- the steps
try status
last="The box is billing."
if [ "$state" = alive ]; then
  [ "$theirs" = "$key" ] || fail "The box is busy with another run: train.py $theirs" "Wait for it, or end it there: tmux attach, Ctrl-C."
  say "back to the run that is there"
elif [ "$theirs" != "$key" ] || [ -z "$mine" ]; then
  try box make_room
  save=$(newest "$out/resume")
  [ -z "$save" ] || try push "$out" ckpt "*.* resume/$save"
  state=stopped
fi
mkdir -p "$in" && printf '%s\n' "$key" >"$out/.remote"
if [ "$state" = stopped ]; then
  say "copying the code and $data/ with $(rsyncs && echo rsync || echo tar)"
  try push "$here" . '*.py exports/*.py exports/*.toml weights/*.py weights/*.toml training/*.py inference/*.py fsdp_launch.sh remote.sh requirements.txt'
  try push "$data" data 'train.jsonl val.jsonl persona.json'
  try box start "$key"
  say "it has begun there; Ctrl-C here doesn't end it"
  state=alive
fi
last="Training goes on there, and the box is still billing. The same command comes back to it."
while [ "$state" = alive ]; do
  await follow || :
  await status || fail "The box doesn't answer as before: $(tail -n 1 "$tmp/error")" "The same command tries again."
  [ "$state" != alive ] || [ -z "$lora" ] || save_home 2>/dev/null || : # else next time
done
last="The box is still billing."
[ "$state" != none ] || fail "Nothing of this run is there any more" "The same command begins again, from the saves that came home."
if [ "$state" = stopped ]; then
  [ -z "$lora" ] || await save_home
  why="before its time (exit code $code): what it said is above"
  [[ $code != 0 || $key != *" --max-minutes "* ]] || why="when --max-minutes were over, as planned"
  say "Training ended $why. The same command goes on, from the last save if there is one."
  exit "${code/killed/1}"
fi
say "bringing it home"
[ -z "$lora" ] || rm -rf "${in:?}"/* # a try for a save may have left an older adapter, of the same size and second
await pull ''
await box check >"$tmp/sums" || fail "What training left doesn't load: $(tail -n 1 "$tmp/error")" "It is in $folder/ckpt there."
sums "$in" | cmp -s - "$tmp/sums" || { rm -rf "$in"; fail "What came home isn't what the box has" "The same command fetches it again."; }
mv -f "$in"/[!r]* "$out/" && mv -f "$in/run.json" "$out/" && rm -rf "$in" # its result, which says that all is here, comes last
last="The box is still billing: destroy it."
say "$out is whole, and loads. Talk to it: python chat.py $out"
[ -z "$lora" ] || say "To merge there, with the base that is there: $line 'cd $folder && HF_HOME=\$PWD/.hub .venv/bin/python lora.py merge ckpt clone'"
[ -z "$on_done" ] || bash -c "$on_done" || { code=$?; say "--on-done ended with exit code $code"; exit "$code"; }
