#!/usr/bin/env bash
# Installs what an image of bgen holds into the Python on PATH, in two parts, so that a change of bgen leaves the first
# one as it is:
#   launch/install.sh packages   everything that bgen needs, in the versions of requirements.lock, and mamba-ssm's kernels
#   launch/install.sh bgen       bgen itself, and its loops for the CPU, compiled into NUMBA_CACHE_DIR
# BGEN_CPU=1: packages without CUDA's, and without the files' checksums, so that torch may be its build for CPUs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lock=$here/requirements.lock

packages() {
  local work
  work=$(mktemp -d)
  if [ "${BGEN_CPU:-0}" = 1 ]; then
    grep -Ev '^ |^#|^(nvidia|cuda|triton)' "$lock" | sed 's/ *\\$//' > "$work/requirements"
    pip install --no-deps --requirement "$work/requirements"
  else
    pip install --no-deps --require-hashes --requirement "$lock"
    # its build imports torch, hence no isolation; its other dependencies serve its language models
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
      pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
  fi
  rm -r "$work"
}

# Cells are simulated, packed, read in the order of training, and trained on: what compiles is kept.
bgen_itself() {
  local work
  pip install --no-deps --no-build-isolation "$here/.."
  work=$(mktemp -d)
  (
    cd "$work"
    quiet="track.mlflow=false track.progress=false train.steps=2"
    bgen data simulate --preset tiny --out cells.h5ad
    bgen data build cells.h5ad --out store
    # shellcheck disable=SC2086
    bgen train vae data.store=store out=vae $quiet
    # shellcheck disable=SC2086
    bgen train flow data.store=store flow.vae=vae out=flow $quiet
  )
  rm -r "$work"
}

case "${1:-}" in
  packages) packages ;;
  bgen) bgen_itself ;;
  *)
    echo "say what to install: $0 packages | bgen" >&2
    exit 2
    ;;
esac
