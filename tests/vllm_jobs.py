"""Runs vLLM several times in one process, and says how each run compares with its source.

Standard input holds a JSON list of jobs: {"model", "out", "tp", "engine", "env", "reference"}; the
file that the command line names gets a list of what `judge` says of each, or of {"error": text}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from compare_vllm import ask_llm, engine, judge, make_reference, settings, texts_of


def run(job: dict[str, Any]) -> dict[str, Any]:
    os.environ.update(settings(job["tp"]) | job["env"])
    from vllm.distributed import cleanup_dist_env_and_memory

    reference = Path(job["reference"])
    if not reference.exists():
        make_reference(Path(job["model"]), reference)
    try:
        arguments = engine(Path(job["out"]), job["tp"], job["engine"])
        return judge(reference, ask_llm(arguments, texts_of(reference)))
    except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the answer
        traceback.print_exc()
        return {"error": str(error)}
    finally:
        for name in job["env"]:
            del os.environ[name]
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = [run(job) for job in json.load(sys.stdin)]
    Path(sys.argv[1]).write_text(json.dumps(answers))
