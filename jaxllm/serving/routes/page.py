"""The chat page at /: files of this package, and nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, HTTPException
from starlette.responses import FileResponse

FOLDER = Path(__file__).parents[1] / "static"
FILES = frozenset(file.name for file in FOLDER.iterdir() if file.is_file())
# Browsers cannot send a key with a page: it is shown to everybody, and asks for the key itself.
OPEN_PATHS = frozenset({"/"} | {f"/static/{name}" for name in FILES})
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """The page."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.get("/static/{name}")
async def file(name: str) -> FileResponse:
    """One of its files."""
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(FOLDER / name, headers=HEADERS)
