#!/usr/bin/env bash
# Runs all tests, the slow ones too; those that need a GPU are skipped where there is none.
#
# usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
