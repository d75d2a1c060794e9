# Sourced by demo.sh and test.sh, from any directory: `setup FILE...` makes .venv ready with what the requirement
# FILEs pin, and does nothing when that has been done before (a stamp in .venv/installed/ holds their checksums).
#
# PYTHON=python3.12 chooses the interpreter; without it an existing .venv is kept, and a new one is made with python3.
# After sourcing: $root (the checkout, now the current directory), $caller (where the user stood), $python (.venv's).
# shellcheck shell=bash

set -euo pipefail
caller=$PWD
root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
cd -- "$root"
python=.venv/bin/python
if [[ ${PYTHON:-} == */* && ${PYTHON:-} != /* ]]; then
  PYTHON=$caller/$PYTHON
fi

say() { printf '== %s\n' "$*" >&2; }

# die CODE SENTENCE: one sentence that names the remedy. Exit codes as everywhere: 1 failed, 2 bad usage or bad input.
die() {
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

# duration SECONDS: in words.
duration() {
  if (($1 < 60)); then
    printf '%d s' "$1"
  elif (($1 < 3600)); then
    printf '%d min %02d s' $(($1 / 60)) $(($1 % 60))
  else
    printf '%d h %02d min' $(($1 / 3600)) $(($1 % 3600 / 60))
  fi
}

help_of() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

trap 'echo >&2; die 130 "interrupted; run the same command again"' INT

python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

stamp_of() { printf '%s python %s' "$(sha256sum <"$1")" "$2"; }

# venv_ready VERSION FILE...: whether .venv has all FILEs installed, on Python VERSION ("" for whichever it has).
venv_ready() {
  local wanted=$1 version file
  shift
  [[ -x $python && ! -e .venv/unfinished ]] || return 1
  version=$(python_version "$python") || return 1
  [[ -z $wanted || $wanted == "$version" ]] || return 1
  for file in "$@"; do
    [[ -f .venv/installed/$file && $(<".venv/installed/$file") == "$(stamp_of "$file" "$version")" ]] || return 1
  done
}

# The sentence for a failed command, from its output.
why() {
  local log=$1
  if grep -qiE 'no space left|disk quota' "$log"; then
    echo "the disk is full; free some space (PyTorch with CUDA takes about 8 GB) and run again"
  elif grep -qE 'ConnectionError|NameResolution|Timeout|ProxyError|SSLError|from versions: none' "$log"; then
    echo "pip could not get the packages from its index; check the network, the proxy (HTTPS_PROXY) and pip's own" \
      "settings (pip config list), and run again"
  else
    echo "$(grep -iE 'error' "$log" | tail -n 1 | sed 's/^error: *//I') (all of it is in $log); mend that and run again"
  fi
}

# What pip is at, by its LOG: the package, without where it comes from.
pip_step() {
  sed -nE -e '/\.metadata/d' -e 's/^ *Collecting ([A-Za-z0-9._-]+).*/finding \1/p' \
    -e 's/^ *(Downloading|Using cached) ([^ ]*\/)?([A-Za-z0-9._]+)-[^ ]* (\([^)]*\)).*/getting \3 \4/p' \
    -e 's/^ *Building wheels? for (collected packages: )?([A-Za-z0-9._-]+).*/building \2/p' \
    -e 's/^Installing collected packages:.*/unpacking, the last part/p' "$1" 2>/dev/null | tail -n 1
}

# tell_progress LOG [EVERY]: a line every EVERY seconds (10), for as long as the script lives.
tell_progress() {
  local started=$SECONDS every=${2:-10} next step
  next=$((started + every))
  while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    if ((SECONDS >= next)); then
      step=$(pip_step "$1")
      say "setup: $(duration $((SECONDS - started))): ${step:-pip starts}"
      next=$((SECONDS + every))
    fi
  done
}

make_venv() {
  local interpreter=$1 log
  rm -rf .venv || die 1 "cannot remove the half-made $root/.venv; remove it yourself and run again"
  { mkdir .venv && touch .venv/unfinished; } 2>/dev/null ||
    die 1 "cannot write to $root; check its permissions and the free space"
  log=.venv/venv.log
  "$interpreter" -m venv .venv >"$log" 2>&1 || die 1 "making .venv failed: $(why "$log")"
}

setup() {
  local started=$SECONDS interpreter=${PYTHON:-python3} wanted="" version package lock file requirements=()
  local teller failed=0
  exec {lock}<"$root" # two setups in one checkout take turns
  if ! flock -n "$lock" 2>/dev/null; then
    say "setup: waiting for another one in this folder"
    flock "$lock" || true # a file system without locks
  fi

  if [[ -n ${PYTHON:-} ]]; then
    wanted=$(python_version "$interpreter") ||
      die 1 "PYTHON=$PYTHON does not run; give a Python 3.11 or newer, e.g. PYTHON=python3.12"
  fi
  if venv_ready "$wanted" "$@"; then
    exec {lock}<&-
    say "setup: nothing to do ($(duration $((SECONDS - started))))"
    return
  fi

  # Keep a .venv that works, unless another Python was asked for; a half-made one is made again.
  if [[ -e .venv/unfinished ]] || ! version=$(python_version "$python") ||
    [[ -n $wanted && $wanted != "$version" ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
    command -v "$interpreter" >/dev/null ||
      die 1 "there is no $interpreter; install it: sudo apt install python3 python3-venv"
    version=$(python_version "$interpreter") || die 1 "$interpreter does not run; reinstall it, or set PYTHON"
    [[ $version =~ ^3\.(1[1-9]|[2-9][0-9])\. ]] ||
      die 1 "$interpreter is Python $version and 3.11 or newer is needed; install one (sudo apt install python3.11 \
python3.11-venv) and name it: PYTHON=python3.11 $0"
    package=python3-venv
    [[ -z ${PYTHON:-} ]] || package=python${version%.*}-venv
    "$interpreter" -c 'import venv, ensurepip' 2>/dev/null ||
      die 1 "$interpreter cannot make virtual environments; install the missing module: sudo apt install $package"
    say "setup: making .venv with Python $version"
    make_venv "$interpreter"
  fi

  say "setup: installing $* (minutes the first time)"
  touch .venv/unfinished || die 1 "cannot write to $root/.venv; check its permissions and the free space"
  for file in "$@"; do
    requirements+=(-r "$file")
  done
  : >.venv/pip.log
  tell_progress .venv/pip.log {lock}<&- & # not pip: a command in the background does not hear Ctrl-C
  teller=$!
  "$python" -m pip install --progress-bar off --disable-pip-version-check "${requirements[@]}" >.venv/pip.log 2>&1 ||
    failed=1
  kill "$teller" 2>/dev/null || true
  wait "$teller" 2>/dev/null || true
  if ((failed)); then
    # pip fetches everything before it installs anything: without a network the environment is as it was.
    [[ $(why .venv/pip.log) != "pip could not get"* ]] || rm -f .venv/unfinished
    die 1 "pip install failed: $(why .venv/pip.log)"
  fi
  mkdir -p .venv/installed
  for file in "$@"; do
    mkdir -p ".venv/installed/$(dirname -- "$file")"
    stamp_of "$file" "$version" >".venv/installed/$file"
  done
  rm -f .venv/unfinished
  exec {lock}<&-
  say "setup: done ($(duration $((SECONDS - started))))"
}
