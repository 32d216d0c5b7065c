# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts beside it: the project's folder, PYTHON, PYTHONPATH, and two helpers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHON=${PYTHON:-python3}
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # other packages bring plugins that import a lot
# build.sh installs there what the kit has and the machine lacks.
export GPU_SITE=$PWD/build/gpu_site
export PYTHONPATH="$PWD:$GPU_SITE${PYTHONPATH:+:$PYTHONPATH}"
# all.sh ends a stage that takes too long by SIGTERM to all of its processes. Without this, bash would
# end first; with it, the script gets the status of the command that was ended, and goes on.
trap : TERM

# A checksum of everything that the compiled module is made of.
sources_checksum() {
  find CMakeLists.txt transducer_toolkit/_version.py csrc -maxdepth 1 -type f \
    ! -name '*.md' ! -name '*.py' -o -name _version.py | LC_ALL=C sort | xargs cat | sha256sum |
    cut -d ' ' -f 1
}

# Ends the stage with the exit status that all.sh prints as "absent" unless the tool is on PATH.
require_tool() {
  command -v "$1" >/dev/null || { echo "figures: no $1 on PATH"; exit 77; }
}
