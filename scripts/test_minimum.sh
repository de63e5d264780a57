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
tests=(tests/test_layers.py tests/test_models.py tests/test_dynamic.py tests/test_exactness.py tests/test_threads.py
       tests/test_rules.py tests/test_any_network.py tests/test_conversion_plan.py tests/test_positions.py
       tests/test_explain.py tests/test_convert.py tests/test_export.py tests/test_render.py tests/test_attribution.py
       tests/test_attribution_methods.py tests/test_photos.py tests/test_video.py tests/test_cli.py
       tests/test_hostile_files.py tests/test_settings.py tests/test_run.py tests/test_publish.py tests/test_card.py
       tests/test_space.py tests/test_stock_timm.py tests/test_command_line.py tests/test_contrast.py)
# torch.export with a free batch size fails in torch 2.5 to 2.7 on our autograd functions; all else runs there
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest "${@:-${tests[@]}}" \
    --deselect tests/test_export.py::test_torch_export_with_any_batch_size
