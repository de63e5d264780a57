#!/usr/bin/env bash
# timm's own tests of models, run on ours. They are taken from the source distribution of the installed timm.
# Arguments are names of models (parts of names); without any, one model per family is tested.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv-test}/bin/python
[ -x "$python" ] || { echo "run scripts/test.sh first, which makes $python"; exit 1; }
models=("${@:-bcos_efficientnet_lite0}")
[ $# -gt 0 ] || models+=(bcos_resnet18 bcosv2_convnext_tiny bcosv2_vit_tiny)
version=$("$python" -c "import timm; print(timm.__version__)")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! "$python" -m pip download --quiet --no-deps --no-binary timm --dest "$folder" "timm==$version"; then
    echo "timm's tests are skipped: its source distribution cannot be downloaded"
    exit 0
fi
tar -xzf "$folder"/timm-*.tar.gz -C "$folder"
chosen=$(printf " or %s" "${models[@]}")
# no download of the official weights; and timm does not run this test on its vision transformers, by their names
chosen="(${chosen# or }) and not (pretrained and mpi) and not (default_cfgs and vit)"
cd "$folder/timm-$version"
OMP_NUM_THREADS=1 "$OLDPWD/$python" -m pytest -q -p timm_bcos -p no:cacheprovider -n 2 --no-header \
    -W ignore tests/test_models.py -k "$chosen"
