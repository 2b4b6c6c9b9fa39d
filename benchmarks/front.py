"""Veritune's inference front over a fixed table of models, without an application.

    python -m benchmarks.front TABLE.json PORT '{"max_batch": 32}'

TABLE: digest → the fields of `ServedModel`.
"""

import json
import sys
from pathlib import Path

import uvicorn

from worker.inference.ipc import EngineSettings
from worker.inference.sampling_params import ServedModel
from worker.inference.server.app import create_inference_app
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.model_resolver import StaticResolver


def main(table: Path, port: int, engine: str) -> None:
    known = {digest: ServedModel(**fields) for digest, fields in json.loads(table.read_text("utf-8")).items()}
    told = ServerSettings(engine=EngineSettings(**json.loads(engine)))
    front = create_inference_app(StaticResolver(known), told)
    uvicorn.run(front, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
