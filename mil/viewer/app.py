"""The routes. Slides, studies, levels and tiles are numbers in them, never names: nothing of a URL reaches the file
system. Functions that read slides run in threads, so that several people can look at once.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from extract.config import ProblemsError
from extract.slides.errors import SlideOpenError
from extract.slides.tiles import GeometryError
from mil.study.reviews import MARKS, read_reviews, with_review, write_reviews
from mil.viewer.guard import TooLargeError
from mil.viewer.pages import KNOWN, AbsentError, Pages
from mil.viewer.pyramid import NoSuchTileError
from mil.viewer.shown import Shown
from mil.viewer.vendored import STATIC

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".txt": "text/plain"}
LONGEST_NOTE = 2000
LARGEST_NUMBER = 10**9


def static_files() -> dict[str, tuple[bytes, str]]:
    """Every file of the page by its path, with its type: read once, so that a URL can name no other."""
    files = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.suffix in TYPES}
    return {name: (path.read_bytes(), TYPES[path.suffix]) for name, path in files.items()}


def whole(request: Request, name: str) -> int:
    """A number of the path or the query.

    Raises:
        AbsentError: it is none, or larger than anything here.
    """
    text = str(request.path_params.get(name, request.query_params.get(name, "")))
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < LARGEST_NUMBER):
        raise AbsentError(f"{name}={text:.20}: expected a whole number")
    return int(text)


def whole_or_none(request: Request, name: str) -> int | None:
    return whole(request, name) if request.query_params.get(name) else None


def decimal_or_none(request: Request, name: str) -> float | None:
    """A number of the query, None where it is not there; AbsentError for what is none."""
    text = request.query_params.get(name)
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise AbsentError(f"{name}={text!r:.20}: expected a number")
    return value


def problem(error: Exception) -> Response:
    """What is wrong, in words, and a status that says which kind of wrong it is."""
    if isinstance(error, AbsentError | NoSuchTileError):
        status = 404
    elif isinstance(error, SlideOpenError):
        status = 410
    elif isinstance(error, TooLargeError):
        return JSONResponse({"problem": "too large"}, 413)
    else:
        status = 422
    return JSONResponse({"problem": "; ".join(getattr(error, "problems", [str(error)]))}, status)


Answer = Callable[[Request], Response]
PROBLEMS = (ProblemsError, AbsentError, GeometryError, TooLargeError, *KNOWN)


def threaded(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """The answer, made in a thread; what is known to go wrong becomes an answer too."""

    async def endpoint(request: Request) -> Response:
        try:
            return await run_in_threadpool(answer, request)
        except PROBLEMS as error:
            return problem(error)
        except OSError as error:
            return JSONResponse({"problem": f"{error.filename or 'the disk'}: {error.strerror}"}, 507)

    return endpoint


def written(answer: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Awaitable[Response]]:
    """A request that writes: JSON in, JSON out."""

    async def endpoint(request: Request) -> Response:
        try:
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                raise AbsentError("expected application/json")
            wish = json.loads(await request.body())
            if not isinstance(wish, dict):
                raise AbsentError("expected an object")
            return JSONResponse(await run_in_threadpool(answer, wish))
        except (ValueError, RecursionError):
            return JSONResponse({"problem": "expected JSON"}, 400)
        except PROBLEMS as error:
            return problem(error)
        except OSError as error:
            return JSONResponse({"problem": f"{error.filename or 'the disk'}: {error.strerror}"}, 507)

    return endpoint


class Reviews:
    """The table of reviews, read anew each time: somebody may edit it meanwhile."""

    def __init__(self, shown: Shown, pages: Pages):
        self.path, self.pages, self.lock = shown.reviews, pages, threading.Lock()

    def all(self) -> list[dict[str, Any]]:
        """slide, mark, note, when."""
        if self.path is None:
            return []
        rows = read_reviews(self.path).to_dict("records")
        return [{str(name): value for name, value in row.items()} for row in rows]

    def put(self, wish: dict[str, Any]) -> list[dict[str, Any]]:
        """One slide's mark; "" takes it away.

        Raises:
            ProblemsError, AbsentError: no such slide or mark, or a note that is too long; nothing was written.
        """
        number, mark, note = wish.get("slide"), wish.get("mark", ""), wish.get("note", "")
        texts = isinstance(mark, str) and isinstance(note, str) and len(note) <= LONGEST_NOTE
        if self.path is None or not isinstance(number, int) or not texts:
            raise AbsentError(f"expected slide (a number), mark and note (at most {LONGEST_NOTE} letters)")
        slide = self.pages.slide(number)
        note = " ".join(letter if letter.isprintable() else " " for letter in note.splitlines() or [""]).strip()
        with self.lock:
            table = with_review(read_reviews(self.path), slide, mark, note, f"{datetime.now():%Y-%m-%d %H:%M:%S}")
            write_reviews(table, self.path)
        return self.all()


def make_app(pages: Pages) -> Starlette:
    """The app without its door (`mil.viewer.guard`)."""
    static, reviews, writing = static_files(), Reviews(pages.shown, pages), threading.Lock()

    async def page(request: Request) -> Response:
        """In memory: some twenty of them are asked for at once, and none needs a thread."""
        name = str(request.path_params.get("name", "index.html"))
        if name not in static:
            return problem(AbsentError("no such file"))
        content, kind = static[name]
        return Response(content, media_type=kind)

    async def listed(request: Request) -> Response:
        return Response(pages.catalogue, media_type="application/json")

    def exclude(wish: dict[str, Any]) -> dict[str, Any]:
        number = wish.get("slide")
        if not isinstance(number, int):
            raise AbsentError("expected slide (a number)")
        with writing:
            return pages.exclude(number, wish)

    def export(request: Request) -> Response:
        text = pages.geojson(
            *(whole(request, "study"), whole(request, "slide"), str(request.path_params["what"])),
            *(request.query_params.get("kind", "attention"), request.query_params.get("scale", "percentile")),
            *(whole_or_none(request, "member"), whole_or_none(request, "target")),
            decimal_or_none(request, "threshold"),
        )
        return Response(text, media_type="application/geo+json")

    def scores(request: Request) -> Response:
        kind, target = request.query_params.get("kind", "attention"), whole_or_none(request, "target")
        honest = request.query_params.get("only") == "honest"
        return binary(pages.scores(whole(request, "study"), whole(request, "slide"), kind, target, honest))

    def tile(request: Request) -> Response:
        return picture(pages.tile(*(whole(request, n) for n in ("slide", "level", "column", "row"))))

    def cut(request: Request) -> Response:
        return picture(pages.picture(*(whole(request, n) for n in ("study", "slide", "tile"))))

    def known(request: Request) -> Response:
        return JSONResponse({"marks": list(MARKS), "reviews": reviews.all()})

    reads: dict[str, Answer] = {
        "/reviews.json": known,
        "/slide/{slide}.json": lambda request: JSONResponse(pages.described(whole(request, "slide"))),
        "/slide/{slide}/thumb.jpg": lambda request: picture(pages.thumb(whole(request, "slide"))),
        "/slide/{slide}/outlines.json": lambda request: JSONResponse(pages.outlines(whole(request, "slide"))),
        "/slide/{slide}/tissue.json": lambda request: JSONResponse(pages.tissue(whole(request, "slide"))),
        "/slide/{slide}/grid.bin": lambda request: binary(pages.grid(whole(request, "slide"))),
        "/slide/{slide}/level/{level}/{column}_{row}.jpg": tile,
        "/study/{study}/slide/{slide}.json": lambda request: JSONResponse(
            pages.details(whole(request, "study"), whole(request, "slide"))
        ),
        "/study/{study}/slide/{slide}/scores.bin": scores,
        "/study/{study}/slide/{slide}/tile/{tile}.jpg": cut,
        "/study/{study}/slide/{slide}/{what}.geojson": export,
    }
    writes = {"/reviews": lambda wish: {"reviews": reviews.put(wish)}, "/exclude": exclude}
    at_once = {"/": page, "/static/{name:path}": page, "/catalogue.json": listed}
    routes = [Route(path, answer, methods=["GET"]) for path, answer in at_once.items()]
    routes += [Route(path, threaded(answer), methods=["GET"]) for path, answer in reads.items()]
    routes += [Route(path, written(answer), methods=["POST"]) for path, answer in writes.items()]
    return Starlette(routes=routes)


def picture(content: bytes) -> Response:
    """JPEG, which the browser may keep as long as the page is open."""
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})


def binary(content: bytes) -> Response:
    return Response(content, media_type="application/octet-stream")
