#!/usr/bin/env bash
# The tests on exactly the oldest versions that pyproject.toml declares, in a virtual environment of their own.
# Without arguments the tests of what the declared dependencies are needed for; with arguments those of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-minimum}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet tomli
"$venv/bin/python" - > "$venv/minima.txt" <<'END'
import re
import tomli
project = tomli.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["attribution"], *extras["video"]]:
    if found := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
        print("{}=={}".format(*found.groups()))
END
cat "$venv/minima.txt"
"$venv/bin/pip" install --quiet --constraint "$venv/minima.txt" -e ".[attribution,video]" pytest scikit-image
tests=(tests/nn/test_layers.py tests/models/test_models.py tests/dynamic_linear/test_dynamic.py
       tests/explanation/test_exactness.py tests/dynamic_linear/test_threads.py tests/conversion/test_rules.py
       tests/conversion/test_own_models.py tests/conversion/test_conversion_plan.py
       tests/conversion/test_positions.py tests/explanation/test_explain.py tests/conversion/test_convert.py
       tests/explanation/test_export.py tests/explanation/test_render.py tests/attribution/test_attribution.py
       tests/attribution/test_attribution_methods.py tests/data/test_photos.py tests/explanation/test_video.py
       tests/cli/test_cli.py tests/cli/test_hostile_files.py tests/evaluation/test_settings.py tests/cli/test_run.py
       tests/hub/test_publish.py tests/hub/test_card.py tests/hub/test_space.py tests/training/test_stock_timm.py
       tests/cli/test_command_line.py tests/explanation/test_contrast.py)
# torch.export with a free batch size fails in torch 2.6 and 2.7 on our autograd functions
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest "${@:-${tests[@]}}" \
    --deselect tests/explanation/test_export.py::test_torch_export_with_any_batch_size
