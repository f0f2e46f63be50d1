#!/usr/bin/env bash
# Makes .venv in the project's folder and installs the project there as it was tested: editable, with the extras of the
# tests and the demo and the versions of constraints.txt. Ends at once where that is done already.
#
# usage: bash scripts/setup.sh [--cpu | --cuda]
#   --cpu   the CPU build of torch, which is the default where there is no NVIDIA GPU; about 620 MB are fetched in all
#   --cuda  PyPI's build of torch, which brings several gigabytes of CUDA packages
#   PYTHON=/path/to/python  the Python 3.11 or 3.12 to use, instead of the first of python3, python3.12 and python3.11
#                           that is one; there is no build of fairseq for Python 3.13
#   TORCH_INDEX=URL         where the CPU build is (default: https://download.pytorch.org/whl/cpu); with --cuda, where
#                           another build is
set -euo pipefail

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }
build=cpu asked=${TORCH_INDEX:-}
[ ! -e /dev/nvidiactl ] || build=cuda
case ${1-} in
  '') ;;
  -h | --help) usage; exit 0 ;;
  --cpu | --cuda) build=${1#--} asked+=$1 ;;
  *) usage >&2; exit 2 ;;
esac
[ $# -le 1 ] || { usage >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=test,docs,translation,export,onnx,hf,plots,images,explore,tensorboard
stamp=.venv/installed

# the checksum also covers this folder: a virtual environment that was moved is broken
wanted=$({ echo "$PWD $extras ${PYTHON:-} $build ${TORCH_INDEX:-}"; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum)
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

torch=$(sed -n 's/^torch==//p' constraints.txt)
size="about 620 MB to fetch, 192 of them torch's CPU build"
[ "$build" = cpu ] || size="several gigabytes to fetch, most of them CUDA for torch; --cpu takes 620 MB instead"
echo "setup: installing into .venv with $("$python" --version): $size"
# --clear mends what an interrupted call or another Python left behind
"$python" -m venv --clear .venv
pip() { .venv/bin/python -m pip "$1" --disable-pip-version-check "${@:2}"; }
if [ "$build" = cpu ]; then
  echo "  torch $torch, CPU"
  # where pip looks anyway, then where PyTorch's builds are
  { [ -z "${TORCH_INDEX:-}" ] && pip install --quiet --no-deps "torch==$torch+cpu" 2> /dev/null; } ||
    pip install --quiet --no-deps "torch==$torch" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" || {
    echo "setup: no CPU build of torch $torch was found; name a place that has one: TORCH_INDEX=URL" >&2
    [ -z "$asked" ] || exit 1
    echo "setup: going on with PyPI's, which brings several gigabytes of CUDA packages" >&2
  }
elif [ -n "${TORCH_INDEX:-}" ]; then
  pip install --quiet "torch==$torch" --index-url "$TORCH_INDEX"
fi
pip install --editable ".[$extras]" --constraint constraints.txt |
  sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing.*/  installing/p'
# fairseq requires torchaudio, for speech alone, and PyPI's needs CUDA. Where it is installed and cannot be imported,
# transformers and peft cannot be imported either; pip check then says that fairseq lacks it, which is harmless
if ! .venv/bin/python -c 'import torchaudio' 2> /dev/null; then
  pip uninstall --quiet --yes torchaudio
fi
echo "$wanted" > "$stamp"
echo "setup: done; to use it: . .venv/bin/activate"
