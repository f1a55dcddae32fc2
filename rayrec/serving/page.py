"""The page at /: one file that holds all it needs and talks to this application only."""

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from rayrec.serving.service import Service

PAGE = "page.html"
# Nothing from elsewhere, nothing sent elsewhere, no frame around it, and no script or style but those in the page.
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page(service: Service) -> APIRouter:
    """The page for people. It holds no data and needs no key: it asks for one where the application does."""
    router = APIRouter(include_in_schema=False)
    content = files("rayrec.serving").joinpath(PAGE).read_bytes()
    headers = {**HEADERS, "Content-Security-Policy": policy(content.decode())}

    @router.get("/")
    async def read() -> Response:
        """The page."""
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    return router


def policy(html: str) -> str:
    """The content security policy of a page with one script and one style: it names them by their digests."""

    def digest(tag: str) -> str:
        inside = html.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        return f"'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'"

    return POLICY.format(script=digest("script"), style=digest("style"))
