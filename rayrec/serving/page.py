"""The page at / and the API's documentation at /docs: nothing comes from other machines."""

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from rayrec.errors import NotFoundError
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
DOCS = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>rayrec API</title><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="swagger-ui"></div><script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script>
</body>
</html>
"""
DOCS_SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", persistAuthorization: false});'
DOCS_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
# Swagger UI sets styles of its own and draws its icons from data.
DOCS_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def page(service: Service) -> APIRouter:
    """The page and the documentation. They hold no data and need no key; both let their reader enter one."""
    router = APIRouter(include_in_schema=False)
    content = files("rayrec.serving").joinpath(PAGE).read_bytes()
    headers = {**HEADERS, "Content-Security-Policy": policy(content.decode())}

    @router.get("/")
    async def read() -> Response:
        """The page."""
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    static = files("fastapi_offline").joinpath("static")

    @router.get("/docs")
    async def docs() -> Response:
        """Swagger UI over /openapi.json."""
        return Response(DOCS, media_type="text/html; charset=utf-8", headers=DOCS_HEADERS)

    @router.get("/docs/{name}")
    async def docs_file(name: str) -> Response:
        """A file of Swagger UI, from the package fastapi-offline."""
        if name == "start.js":
            return Response(DOCS_SCRIPT, media_type="text/javascript", headers=DOCS_HEADERS)
        if name not in DOCS_FILES:
            raise NotFoundError(f"/docs has no file {name[:100]}")
        return Response(static.joinpath(name).read_bytes(), media_type=DOCS_FILES[name], headers=DOCS_HEADERS)

    return router


def policy(html: str) -> str:
    """The content security policy of a page with one script and one style: it names them by their digests."""

    def digest(tag: str) -> str:
        inside = html.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        return f"'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'"

    return POLICY.format(script=digest("script"), style=digest("style"))
