#!/usr/bin/env bash
# Runs all tests, the slow ones too, on all cores; those that need a GPU are skipped where there is none.
#
# usage: bash scripts/test.sh [pytest arguments]
#   -n 0              in this process alone
#   -m "not slow"     the quick ones
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 1 "$@"
