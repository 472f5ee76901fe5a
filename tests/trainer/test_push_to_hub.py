"""`push_to_hub` against a small server on localhost that speaks the Hub's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fake_hub import FakeHub

SCRIPT = Path(__file__).with_name("push_run.py")


def test_what_is_pushed_is_the_merged_aligned_draft_with_its_card(tmp_path):
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    with FakeHub() as hub:
        environment = {
            **os.environ, "PYTHONPATH": paths, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_test", "CI": "1",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        command = [sys.executable, str(SCRIPT), str(tmp_path / "run")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:] + "\n".join(hub.requests)
    assert "model.safetensors" in hub.files and "adapter_model.safetensors" not in hub.files
    assert json.loads(hub.files["config.json"])["vocab_size"] == 288
    card = hub.files["README.md"].decode()
    assert "white-box distillation" in card and "me/draft" in card and "hf_test" not in card
