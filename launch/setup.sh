# shellcheck shell=bash
# Creates the virtual environment `.venv` at the root of the repository. Meant to be sourced: `. launch/setup.sh`, then
# `setup_venv titan` or `setup_venv titan,test` (extras of pyproject.toml). An environment that is up to date is reused.

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO_ROOT/.venv"

fail() {
    echo "error: $*" >&2
    exit 1
}

# The first Python 3.10 or newer: $PYTHON if set, else the usual names.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || return 1
    done
    return 1
}

# A hash of what an environment depends on: any change causes a new installation.
setup_hash() {
    "$1" - "$REPO_ROOT/pyproject.toml" "$REPO_ROOT/launch/constraints.txt" "$REPO_ROOT/launch/setup.sh" <<'PY'
import hashlib, sys
digest = hashlib.sha256(sys.version.encode() + sys.argv[1].encode())
for path in sys.argv[1:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest())
PY
}

setup_venv() {
    local extras="$1" python hash stamp="$VENV/setup-stamp" log="$VENV/setup.log"
    python="$(find_python)" || fail "Python 3.10 or newer is needed${PYTHON:+, and PYTHON=$PYTHON is not one}." \
        "Install it, or set PYTHON=/path/to/python3 bash $0"
    hash="$(setup_hash "$python")"
    if [ -x "$VENV/bin/python" ] && { [ "$(cat "$stamp" 2>/dev/null)" = "$hash $extras" ] ||
        [ "$(cat "$stamp" 2>/dev/null)" = "$hash titan,test" ]; }; then
        return
    fi

    if [ ! -x "$VENV/bin/python" ] || [ "$(cut -d' ' -f1 "$stamp" 2>/dev/null)" != "$hash" ]; then
        rm -rf "$VENV"
        if ! "$python" -m venv "$VENV" >/dev/null 2>&1; then
            rm -rf "$VENV"
            fail "$python cannot create a virtual environment. Install its venv module (on Debian and Ubuntu:" \
                "apt install python3-venv), then run this again."
        fi
    fi
    rm -f "$stamp"
    echo "Installing titan-adam-mini[$extras] into .venv (torch is large: minutes the first time; log: .venv/setup.log)"
    if ! (cd "$REPO_ROOT" && "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint launch/constraints.txt --editable ".[$extras]") >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "pip could not install titan-adam-mini[$extras]; see the end of $log above." \
            "It needs a package index with the versions of launch/constraints.txt: check the network and pip's" \
            "configuration (pip config list), then run this again."
    fi
    echo "$hash $extras" >"$stamp"
}
