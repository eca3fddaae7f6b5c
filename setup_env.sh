#!/usr/bin/env bash
# Make (or refresh) the virtual environment $VENV: one torch / torchrec / fbgemm triplet for this machine's device.
# DEVICE=cpu|cuda picks the build; without it, a machine where nvidia-smi lists a GPU gets cuda, any other cpu.
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv} PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-2.13.0} TORCHREC=${TORCHREC:-1.8.0} FBGEMM=${FBGEMM:-1.8.0}
if [ -z "${DEVICE:-}" ]; then
  DEVICE=cpu
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then DEVICE=cuda; fi
fi
wanted="$(cat setup_env.sh pyproject.toml | sha256sum | cut -c1-16) $DEVICE torch=$TORCH torchrec=$TORCHREC fbgemm=$FBGEMM $PWD"
if [ "$(cat "$VENV/.ready" 2>/dev/null || true)" = "$wanted" ]; then exit 0; fi
echo "setting up $VENV ($DEVICE: torch $TORCH, torchrec $TORCHREC, fbgemm $FBGEMM) ..." >&2
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check install -q "$@"; }
# torch comes first, or tensordict would bring in the newest CUDA build. TORCH_INDEX names another wheel index.
pip "torch==$TORCH" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
pip -e '.[torchrec,train,launch,convert,dev]'
# --no-deps: torchrec asks for fbgemm-gpu by name, whose CUDA build would overwrite fbgemm-gpu-cpu.
case $DEVICE in cpu) fbgemm=fbgemm-gpu-cpu ;; *) fbgemm=fbgemm-gpu ;; esac
pip --no-deps "$fbgemm==$FBGEMM" "torchrec==$TORCHREC"
"$VENV/bin/python" -W ignore -c 'import torchrec_compress'
echo "$wanted" >"$VENV/.ready"
