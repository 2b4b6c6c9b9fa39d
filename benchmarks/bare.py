"""The peer of GET /jobs/{id}: FastAPI and uvicorn with one static response.

    python -m benchmarks.bare PORT FILE

`/plain` is a plain `def` route that returns FILE's document, as a route of the API does. `/ready` is an `async def`
route that returns the bytes unchanged, which is FastAPI's minimum. uvicorn has the options of `veritune api`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response


def create_app(answer: bytes) -> FastAPI:
    app = FastAPI()
    document: dict[str, Any] = json.loads(answer)

    @app.get("/plain/{name}")
    def plain(name: str) -> dict[str, Any]:
        return document

    @app.get("/ready/{name}")
    async def ready(name: str) -> Response:
        return Response(answer, media_type="application/json")

    return app


if __name__ == "__main__":
    app = create_app(Path(sys.argv[2]).read_bytes())
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
