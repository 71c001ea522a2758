#!/usr/bin/env bash
# Train on a rented machine, with the line that its provider shows; what follows -- are train.py's flags:
#   ./remote.sh 'ssh -p 40123 root@1.2.3.4' [--on-done CMD] -- --lora
#
# Code, data/*.jsonl and a base that is a folder go there; never the export. Training runs in tmux and does without us: Ctrl-C, or a
# laptop that sleeps, ends nothing. The same command comes back to it, goes on from the last save after its end, also on another box,
# and brings home what is ready. A LoRA's saves come home while it trains; of a full fine-tune only the end comes.
# --on-done CMD runs here, once the model has loaded there and is here byte for byte. BOX_FOLDER: the folder there (doppelganger).
# shellcheck disable=SC2317,SC2046 # the box's half is called by name; file names that are split have no spaces
set -euo pipefail
umask 077
export COPYFILE_DISABLE=1 # or macOS's tar adds files of its own
fail() { printf '%s\n' "$@" >&2; exit 2; }
say() { printf 'remote: %s\n' "$*"; }

# --- on the box: home sends this file, and says what to call

cuda() { nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Z ]* Version *: *\([0-9.]*\).*/\1/p' | sed -n 1p || :; } # what the driver can do

pythons() { # those that are new enough
  for python in python3 python /venv/main/bin/python /opt/conda/bin/python python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$python"
  done || :
}

works() { # PYTHON: its torch is no older than we need, and computes on this card → where it lies
  "$1" -c 'import os, sys, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
torch.ones(8, device=sys.argv[1]).sum().item()
print(os.path.dirname(os.path.dirname(torch.__file__)))' "$([ -z "$(cuda)" ] && echo cpu || echo cuda)"
}

look() { # → the flags of the run that is there; its state, its exit code, rsync or tar
  local state=empty
  if [ -e .run/flags ]; then
    state=stopped
    if ! flock -sn 9 9>>.run/lock; then state=alive; elif grep -qs '"result"' ckpt/run.json; then state=ready; fi
  fi
  [ -n "$(pythons)" ] || fail "The box has no Python 3.11 or newer ($(python3 --version 2>&1 || :))" "Rent one with a newer image."
  case $(cuda) in [1-9].* | 1[01].*) fail "The box's NVIDIA driver knows CUDA $(cuda) at most" "Rent one with CUDA 12.6 or newer." ;; esac
  cat .run/flags 2>/dev/null || echo
  echo "$state $(cat .run/exit 2>/dev/null || echo killed) $(command -v rsync >/dev/null && echo rsync || echo tar)"
}

aside() { [ ! -e ckpt ] || mv ckpt "ckpt-before-$(date +%s)"; rm -rf .run; } # another run's: it may not have come home yet

start() { # FLAGS HOW
  mkdir -p .run && rm -f .run/exit .run/started && printf '%s\n' "$1" >.run/flags && echo "$2" >.run/how
  command -v tmux || { [ "$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y tmux; } || :
  tmux new-session -d -s doppelganger "bash remote.sh --on-box . run" || { setsid nohup bash remote.sh --on-box . run </dev/null & }
  for _ in $(seq 100); do [ ! -e .run/started ] || return 0; sleep 0.1; done
  return 1
} >/dev/null 2>&1

run() { # in tmux; the lock is held as long as any process of the run lives
  exec 9>.run/lock && flock -n 9
  : >.run/log && touch .run/started
  trap : INT # it is for train.py, who saves
  set +e
  (set -e; prepare; train) 2>&1 | tee -i .run/log
  echo "${PIPESTATUS[0]}" >.run/exit
}

prepare() { # .venv: over the image's own torch where that works, else with the wheel for the driver
  local torch place wheel wheels python=
  [ "$(cat .venv/for 2>/dev/null)" != "$(cksum <requirements.txt)" ] || return 0
  pip() { .venv/bin/python -m pip -q --disable-pip-version-check "$@"; }
  for python in $(pythons); do if place=$(works "$python" 2>/dev/null); then break; fi; done
  [ -n "$place" ] || python=$(pythons | sed -n 1p)
  rm -rf .venv && "$python" -m venv --without-pip ${place:+--system-site-packages} .venv
  if [ -n "$place" ]; then # by a .pth too: $python may be a venv's itself
    echo "$place" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/image.pth"
    say "the image's torch works and is kept ($python)"
  fi
  .venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip >/dev/null 2>&1 || { # Debian has it in a package
    apt-get -qq update && apt-get -qq install -y python3-venv && .venv/bin/python -m ensurepip >/dev/null
  } || fail "$python on the box can't make a pip" "Install python3-venv there, or rent it with another image."
  if [ -z "$place" ]; then
    torch=$(grep '^torch==' requirements.txt)
    case $(cuda) in '') wheels=cpu ;; 12.[0-7]) wheels=cu126 ;; 12.*) wheels="cu128 cu126" ;; *) wheels="cu130 cu128 cu126" ;; esac
    for wheel in $wheels; do # not every torch has every wheel, nor does each know every card
      say "installing $torch+$wheel"
      if pip install "$torch+$wheel" --index-url "https://download.pytorch.org/whl/$wheel" && works .venv/bin/python; then break; fi
    done
    works .venv/bin/python >/dev/null || fail "No $torch works there (driver: CUDA $(cuda))" "Rent a box with a newer driver or newer image."
  fi
  grep -v '^torch==' requirements.txt >.venv/others
  pip install -r .venv/others
  cksum <requirements.txt >.venv/for
}

train() {
  local gpus flags
  export PATH="$PWD/.venv/bin:$PATH" HF_HOME="$PWD/.hub" PYTHONUNBUFFERED=1
  eval "flags=($(cat .run/flags .run/how))"
  gpus=$(nvidia-smi -L 2>/dev/null | wc -l || :)
  case " ${flags[*]} " in *" --lora "* | *" --qlora "*) gpus=1 ;; esac # over a sharded base it would wait for the bus between them
  if [ "$gpus" -gt 1 ]; then ./fsdp_launch.sh "${flags[@]}"; else python train.py "${flags[@]}"; fi
}

follow() { # the log from a byte on, until the run ends
  flock -s 9 9>>.run/lock >/dev/null 2>&1 &
  tail -c "+$1" --pid=$! -f .run/log
}

snapshot() { # WHAT HAVE BASE → a word for what is there. .run/home links to it: train.py may delete it, home may be slow
  local file save=''
  rm -rf .run/home && mkdir -p .run/home/resume
  if [ "$1" = saves ]; then # first: nothing else may be older
    for save in ckpt/resume/step-????????; do :; done
    [ ! -d "$save" ] || [ "${save##*/}" = "$2" ] || cp -rpl "$save" .run/home/resume/
  fi
  for file in ckpt/*; do
    case $file in *.new | */new-* | */resume) ;; *.jsonl | *_config.json) cp -p "$file" .run/home/ ;; *.*) cp -pl "$file" .run/home/ ;; esac
  done
  file=.run/home/adapter_config.json
  [ -z "$3" ] || [ ! -e $file ] || .venv/bin/python -c 'import sys, pathlib, config
path = pathlib.Path(sys.argv[1])
config.write_json(path, config.read_json(path) | {"base_model_name_or_path": sys.argv[2]})' $file "$3" # as home names it
  (stat -c '%n %i %y' ckpt/*.safetensors "$save" 2>/dev/null || :) | cksum | tr ' ' -
}

check() { # load what training left → the sums of what home must have
  .venv/bin/python -c 'import os, torch, checkpoint
base = "base" if os.path.isdir("base") and checkpoint.is_adapter("ckpt") else None
checkpoint.load_model("ckpt", device="cuda" if torch.cuda.is_available() else "cpu", base=base)' >&2
  cd .run/home && cksum -- *.*
}

if [ "${1:-}" = --on-box ]; then
  mkdir -p "$2" && cd "$2" && shift 2
  "$@"
  exit
fi

# --- at home

there() { bash "$tmp/ssh" box "$@"; }
box() { there "bash -s -- --on-box $folder $(printf '%q ' "$@")" <"$here/remote.sh"; }
rsyncs() { [ "$copies" = rsync ] && command -v rsync >/dev/null; }
newest() { for have in "$out"/resume/step-*; do :; done; [ -d "$have" ] && have=${have##*/} || have=''; } # save at home

send() { # the named files of a folder here → a folder of the box's
  local from=$1 to=$folder/$2
  shift 2
  if rsyncs; then (cd "$from" && rsync -rLptRz -e "bash $tmp/ssh" "$@" "box:$to/"); else
    tar -C "$from" -chzf - "$@" | there "umask 077; mkdir -p $to; tar -C $to --no-same-owner -xzf -"
  fi
}

listed() { for file in "$@"; do [ ! -f "$file" ] || printf '%s\n' "$file"; done; } # no such name has a space

begin() { # a run on the box, or let it go on
  local how=--resume
  if [ "$state" = empty ]; then
    box aside || return
    newest
    if [ -n "$have" ] && [ -z "$anew" ]; then
      say "going on from $out/resume/$have"
      send "$out" ckpt $(cd "$out" && listed ./*) "resume/$have" || return
    else
      how=''
    fi
  fi
  say "copying the code, $data/${base:+ and $base/} with $(rsyncs && echo rsync || echo tar)"
  send "$here" . $(cd "$here" && listed ./*.py exports/*.py fsdp_launch.sh remote.sh requirements.txt) &&
    send "$data" data $(cd "$data" && listed train.jsonl val.jsonl persona.json) &&
    { [ -z "$base" ] || send "$base" base $(cd "$base" && listed config.json generation_config.json ./*.index.json ./*.safetensors ./*token*); } &&
    box start "$key" "$how"
}

fetch() { # WHAT, if there is news: it comes beside, and gets its name when it is whole
  local in=$out/.incoming news file
  newest
  news=$(box snapshot "$1" "$have" "$base") || return 255
  [ "$news" != "$last" ] || return 0
  mkdir -p "$in"
  if rsyncs; then
    rsync -rlpt --partial --delete -e "bash $tmp/ssh" "box:$folder/.run/home/" "$in/" || return 255
  else
    rm -rf "${in:?}"/* && there "tar -C $folder/.run/home -cf - ." | tar -C "$in" -xf - || return 255
  fi
  for file in "$in"/*.safetensors "$in"/[!r]* "$in"/r*; do # run.json last: a result in it says that all is here
    [ ! -f "$file" ] || mv -f "$file" "$out/" || return 255
  done
  for file in "$in"/resume/step-*; do
    [ -d "$file" ] || continue
    mkdir -p "$out/resume" && mv "$file" "$out/resume/" || return 255
    [ -z "$have" ] || rm -rf "${out:?}/resume/$have"
    say "${file##*/} is home"
  done
  last=$news
}

await() { # do it as soon as there is a connection (255 is ssh's word for none)
  local wait=2 ended began
  while began=$SECONDS ended=0 && { "$@" 2>"$tmp/error" || ended=$?; } && [ "$ended" = 255 ]; do
    [ $((SECONDS - began)) -lt 60 ] || wait=2
    say "no connection ($(tail -n 1 "$tmp/error")). Training goes on there; trying again in $wait s"
    sleep "$wait"
    wait=$((wait < 60 ? wait * 2 : 60))
  done
  return "$ended"
}

log() { box follow "$((1 + $(wc -c <"$tmp/log")))" | tee -a "$tmp/log"; }
sums() { box check >"$tmp/sums"; }
status() { box look >"$tmp/look" && { IFS= read -r theirs && read -r state code copies; } < <(tail -n 2 "$tmp/look"); }
bye() { say "The box is still billing: destroy it." && exit "$1"; }

line='' on_done='' data=data out=ckpt model='' lora='' resume='' anew='' base='' last='' flags=() words=()
usage="./remote.sh 'ssh -p 40123 root@1.2.3.4' [--on-done CMD] -- --lora"
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in --on-done) on_done=${2:-} && shift ;; *) line="$line $1" ;; esac
  shift || fail "--on-done needs a command" "$usage"
done
while IFS= read -r word; do words+=("$word"); done < <(xargs printf '%s\n' <<<"$line" 2>/dev/null)
if [ "${words[0]:-}" != ssh ] || [ ${#words[@]} -lt 2 ] || [ $# = 0 ]; then
  fail "The line that the provider shows is needed, then --, then the flags of train.py:" "$usage"
fi
shift
for flag in "$@"; do
  case $flag in
    --resume) resume=yes ;;
    --overwrite) anew=yes ;;
    --data=* | --out=* | --model=*) flags+=("${flag%%=*}" "${flag#*=}") ;;
    *) flags+=("$flag") ;;
  esac
done
flags+=(--data data --out ckpt) # there; the last of a flag counts
for ((i = 0; i < ${#flags[@]} - 4; i++)); do
  case ${flags[i]} in
    --lora | --qlora) lora=yes ;;
    --data) data=${flags[i + 1]} ;; --out) out=${flags[i + 1]%/} ;; --model) model=${flags[i + 1]} ;;
  esac
done
for part in train val; do
  [ -f "$data/$part.jsonl" ] || fail "$data/$part.jsonl is missing: there is nothing to train on" "Make it from your export: python data.py result.json"
done
if [ -d "$model" ]; then base=$(cd "$model" && pwd) && flags+=(--model base); fi
case $base$model in /* | .*) [ -n "$base" ] || fail "$model: there is no such folder" "Give a model folder, or a hub id." ;; esac
key=$(printf '%q ' "${flags[@]}") mine=''
if [ "$(cat "$out/.remote" 2>/dev/null)" = "$key" ]; then mine=yes anew=''; fi
[ -n "$mine$resume$anew" ] || [ -z "$(ls "$out" 2>/dev/null)" ] ||
  fail "$out already holds something" "Name another folder with --out, or say --overwrite to replace it, or --resume to go on with it."

here=$(cd "$(dirname "$0")" && pwd) folder=${BOX_FOLDER:-doppelganger}
tmp=$(mktemp -d /tmp/doppelganger.XXXXXX) # short: a socket's path must be
trap 'bash "$tmp/ssh" box -O exit >/dev/null 2>&1 || :; rm -rf "$tmp"' EXIT
trap 'echo && say "$left" && exit 130' INT
left="Nothing has begun there. The box is billing."
mkdir -p "$HOME/.ssh" && : >"$tmp/log"
{ # rented addresses come again with other keys: they have a list of their own
  printf 'shift\nexec '
  printf '%q ' "${words[@]}" -T -o StrictHostKeyChecking=accept-new -o "UserKnownHostsFile=\"$HOME/.ssh/known_hosts.doppelganger\"" \
    -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o ConnectTimeout=20 -o ClearAllForwardings=yes -o LogLevel=ERROR \
    -o ControlMaster=auto -o "ControlPath=$tmp/socket" -o ControlPersist=60
  echo "\${BATCH:+-o BatchMode=yes} \"\$@\""
} >"$tmp/ssh"

status 2>"$tmp/error" || { # 2: it has said what is wrong
  [ $? != 2 ] || { tail -n 2 "$tmp/error" >&2 && exit 2; }
  fail "ssh can't work there: $(tail -n 1 "$tmp/error")" \
    "Does the box run, and is this the whole line (for direct ssh)? If another box had this address: rm ~/.ssh/known_hosts.doppelganger"
}
if [ "$state" = alive ]; then
  [ "$theirs" = "$key" ] || fail "The box is busy with another run: train.py $theirs" "Wait for it, or end it there: tmux attach, Ctrl-C."
elif [ "$theirs" != "$key" ] || [ -n "$anew" ]; then
  state=empty
fi
if [ "$state" = empty ] && [ -n "$mine" ] && grep -qs '"result"' "$out/run.json"; then
  say "$out is finished: nothing is left to do. Talk to it: python chat.py $out" && bye 0
fi
case $state in
  alive) say "back to the run that is there" ;;
  empty | stopped)
    begin 2>"$tmp/error" || fail "It can't begin there: $(tail -n 1 "$tmp/error")" "The same command tries again. The box is billing."
    say "it has begun there; Ctrl-C here doesn't end it" && state=alive ;;
esac
left="Training goes on there, and the box is still billing. The same command comes back to it."
mkdir -p "$out" && chmod 700 "$out"
[ -z "$anew" ] || (cd "$out" && rm -rf resume metrics.jsonl loss.png run.json adapter_* config.json model*.safetensors model.safetensors.index.json)
printf '%s\n' "$key" >"$out/.remote"

if [ "$state" = alive ] && [ -n "$lora" ]; then
  for ((n = 1; ; n++)); do
    sleep 1
    [ ! -e "$tmp/end" ] && kill -0 $$ || exit 0
    [ $((n % ${FETCH_SECONDS:-60})) != 0 ] || BATCH=yes fetch saves || :
  done 2>/dev/null &
fi
while [ "$state" = alive ]; do
  await log || :
  await status || fail "The box doesn't answer as before: $(tail -n 1 "$tmp/error")" "The same command tries again. The box is billing."
done
touch "$tmp/end" && wait
case $state in
  empty) fail "Nothing of this run is there any more" "The same command begins again, from the saves that came home. The box is billing." ;;
  stopped)
    [ -z "$lora" ] || await fetch saves
    [ "$code" != killed ] || code=1
    [ "$code" != 0 ] || { say "stopped before its end, as asked; the same command goes on" && bye 0; }
    printf '%s\n' "Training ended before its time (exit code $code); what it said is above" "The same command goes on from the last save." >&2
    bye "$code" ;;
esac
say "bringing it home" && await fetch end
await sums || fail "What training left doesn't load: $(tail -n 1 "$tmp/error")" "It is in $out as it is. The box is still billing."
rm -rf "$out/.incoming"
(cd "$out" && cksum -- $(awk '{ print $3 }' "$tmp/sums")) | cmp -s - "$tmp/sums" || fail "$out isn't what the box has" "The same command fetches it again."
say "$out is whole, and loads. Talk to it: python chat.py $out"
code=0 && { [ -z "$on_done" ] || bash -c "$on_done" || code=$?; }
[ "$code" = 0 ] || say "--on-done ended with exit code $code"
bye "$code"
