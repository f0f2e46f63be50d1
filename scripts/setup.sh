#!/usr/bin/env bash
# Makes .venv in the project's folder and installs the project there as it was tested: editable, with the extras of the
# tests and the demo and the versions of constraints.txt. Ends at once where that is done already.
#
# usage: bash scripts/setup.sh
#   PYTHON=/path/to/python  the Python 3.11 or 3.12 to use, instead of the first of python3, python3.12 and python3.11
#                           that is one
set -euo pipefail

if [ $# -ne 0 ]; then
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=test,docs,translation,export,onnx,hf,plots,images,explore,tensorboard
stamp=.venv/installed

# the checksum also covers this folder: a virtual environment that was moved is broken
wanted=$({ echo "$PWD $extras ${PYTHON:-}"; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum)
works() { .venv/bin/python -c 'from importlib.util import find_spec
assert all(map(find_spec, ("torch", "fairseq", "fairseq_adaptive")))' 2> /dev/null; }
if [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ] && works; then
  echo "setup: .venv is up to date"
  exit 0
fi

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null; }
candidates=(python3 python3.12 python3.11)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
python=
for candidate in "${candidates[@]}"; do
  if suits "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "setup: no Python 3.11 or 3.12 found (tried: ${candidates[*]});" \
    "install one, or name it: PYTHON=/path/to/python bash scripts/setup.sh" >&2
  exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2> /dev/null; then
  echo "setup: $python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 1
fi

echo "setup: installing into .venv with $("$python" --version); some minutes the first time"
# --clear mends what an interrupted call or another Python left behind
"$python" -m venv --clear .venv
.venv/bin/python -m pip install --disable-pip-version-check --editable ".[$extras]" --constraint constraints.txt |
  sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing.*/  installing/p'
# fairseq requires torchaudio, for speech alone, and PyPI's needs CUDA. Where it is installed and cannot be imported,
# transformers and peft cannot be imported either; pip check then says that fairseq lacks it, which is harmless
if ! .venv/bin/python -c 'import torchaudio' 2> /dev/null; then
  .venv/bin/python -m pip uninstall --disable-pip-version-check --quiet --yes torchaudio
fi
echo "$wanted" > "$stamp"
echo "setup: done; to use it: . .venv/bin/activate"
