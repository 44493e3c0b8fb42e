"""`pixellm muse review`: a page on this machine to accept, reject and edit pairs with their masks drawn.

Plain files, nothing from elsewhere and nothing built. What the page writes is on disk before it says so.
"""

import getpass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

import pixellm
from pixellm.errors import DataError, ServingError
from pixellm.jobs.muse.decisions import Verdict
from pixellm.jobs.muse.review_data import ReviewFolder

_PAGE_DIR = Path(__file__).parent / "review_page"
#: Drawing of masks is the serving page's own.
_SHARED_DIR = Path(pixellm.__file__).parent / "serve" / "page"
_FILES = {name: _PAGE_DIR / name for name in ("index.html", "review.css", "review.js", "pair.js")} | {
    name: _SHARED_DIR / name for name in ("overlay.js", "rle.js", "icon.svg")
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class DecisionBody(BaseModel):
    """What the page sends: a pair, a verdict, a name, and the texts of an edit."""

    model_config = ConfigDict(extra="forbid")

    split: str
    position: int = Field(ge=0)
    pair: str
    verdict: Verdict
    who: str = Field(max_length=200)
    question: str = Field("", max_length=4000)
    answer: str = Field("", max_length=8000)
    kept_targets: tuple[int, ...] = ()
    phrases: tuple[str, ...] = ()


def build_review_app(folder: ReviewFolder, who: str) -> FastAPI:
    """The page and its API as an ASGI application.

    Args:
        folder: what is reviewed.
        who: name that the page proposes.
    """
    app = FastAPI(title="pixellm muse review", openapi_url=None)

    @app.exception_handler(DataError)
    def explain(_request: Request, error: DataError) -> Response:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        origin = request.headers.get("origin")
        if request.method != "GET" and origin and urlsplit(origin).netloc != request.headers.get("host"):
            return JSONResponse({"error": "requests from other pages are refused"}, status_code=403)
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/")
    def index() -> Response:
        return _file("index.html")

    @app.get("/page/{name}")
    def page_file(name: str) -> Response:
        return _file(name)

    @app.get("/api/summary")
    def summary() -> dict[str, Any]:
        return folder.summary() | {"who": who}

    @app.get("/api/items/{split}/{position}")
    def item(split: str, position: int) -> dict[str, Any]:
        return folder.item(split, position)

    @app.get("/api/pictures/{split}/{position}")
    def picture(split: str, position: int) -> Response:
        content = folder.picture(split, position)
        return Response(content, media_type="image/png" if content.startswith(b"\x89PNG") else "image/jpeg")

    @app.post("/api/decisions")
    def decide(body: DecisionBody) -> dict[str, Any]:
        edit = body.model_dump(include={"question", "answer", "kept_targets", "phrases"})
        decision = folder.decide(body.split, body.position, body.pair, body.verdict, body.who, **edit)
        return {"verdict": decision.verdict, "who": decision.who, "when": decision.when}

    @app.post("/api/apply")
    def apply() -> dict[str, Any]:
        return folder.apply().to_json_dict()

    return app


def review_forever(uri: str, *, host: str, port: int, who: str | None) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        DataError: there is nothing to review at `uri`.
        ServingError: the port is taken.
    """
    import uvicorn  # slow

    app = build_review_app(ReviewFolder(uri), who or _user_name())
    print(f"reviewing {uri} at http://{host}:{port} (Ctrl-C stops it; every decision is on disk already)", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    try:
        server.run()
    except SystemExit:
        raise ServingError(f"cannot listen on {host}:{port}; another program may use it, give another --port") from None


def _file(name: str) -> Response:
    path = _FILES.get(name)
    if path is None:
        return JSONResponse({"error": f"there is no file {name}"}, status_code=404)
    return Response(path.read_bytes(), media_type=_TYPES[path.suffix])


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
