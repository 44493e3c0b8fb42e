"""The server that one writes in an afternoon: FastAPI, one engine, a lock. What `benchmarks.serve` compares with."""

import asyncio
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, File, Form, UploadFile

from pixellm.model.engine import PixelLMEngine


def build(folder: str) -> FastAPI:
    app, lock = FastAPI(), asyncio.Lock()
    engine = PixelLMEngine.from_pretrained(folder, max_batch_size=1)

    @app.post("/v1/segment")
    async def segment(image: UploadFile = File(), prompt: str = Form(), max_tokens: int = Form()) -> dict[str, Any]:  # noqa: B008
        content = await image.read()
        async with lock:
            result = await asyncio.to_thread(engine.segment, content, prompt, max_new_tokens=max_tokens)
        targets = [{"phrase": target.phrase, "mask": target.rle} for target in result.targets]
        return {"text": result.text, "targets": targets}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(build(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
