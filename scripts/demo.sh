#!/usr/bin/env bash
# A fresh virtual environment, the package, and the main job on real photos; figures go to demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-demo}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet .
"$venv/bin/timm-bcos" explain scripts/photos --top 1 --out demo
"$venv/bin/timm-bcos" explain scripts/photos/clothes --model bcos_efficientnet_lite0.clothing --top 1 --out demo/clothes
"$venv/bin/timm-bcos" explain scripts/photos/chelsea.jpg --model bcos_cifar_resnet20 --top 1 --out demo/cifar
echo "demo/ holds, by model, a figure per photo, and for each class its explanation as a transparent PNG and an overlay at the size of the photo."
