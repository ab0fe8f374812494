"""Tiny models as plain folders, which load in no time."""

from __future__ import annotations

import json
from pathlib import Path

ECHO = "def handle(data, context):\n    return data and [row.get('body') for row in data]\n"
BROKEN = "raise RuntimeError('broken on purpose')\n"
SLOW_TO_LOAD = "import time\ntime.sleep(60)\n" + ECHO
OUT_OF_REACH = "import module_that_does_not_exist\n"


def write_model(
    store: Path, folder: str, code: str = ECHO, *, name: str | None = None, version: str = "1.0", config: str = ""
) -> Path:
    """Write a model folder into ``store``; return its path."""
    path = store / folder
    (path / "MAR-INF").mkdir(parents=True)
    (path / "handler.py").write_text(code)
    model = {"modelName": name or folder, "modelVersion": version, "handler": "handler.py"}
    if config:
        (path / "model-config.yaml").write_text(config)
        model["configFile"] = "model-config.yaml"
    manifest = {"runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    (path / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    return path
