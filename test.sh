#!/usr/bin/env bash
# Set everything up, then check the code and run the tests:
#
#   ./test.sh                                # ruff, then all tests
#   ./test.sh tests/test_shell.py -x -v      # arguments go to pytest
#   PYTHON=python3.12 ./test.sh              # make .venv with another Python (3.11 or newer)
#
# Creates .venv and installs requirements/dev.txt when needed. The exit code is that of the first step that failed.

set -euo pipefail
# shellcheck source=.ci/setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.ci/setup.sh"

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  help_of "$root/test.sh"
  exit
fi
setup requirements.txt requirements/k8s.txt requirements/docs.txt requirements/dev.txt
say "ruff check"
"$python" -m ruff check --quiet .
say "pytest"
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start, and read what the first has compiled
exec "$python" -m pytest -m "" -n 4 --dist worksteal "$@" # more than there are cores: many wait for processes of their own
