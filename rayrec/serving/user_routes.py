"""Stored users over HTTP: new plays, and tastes."""

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from rayrec.serving.problems import DOCUMENTED, documented
from rayrec.serving.schemas import as_json
from rayrec.serving.serve_config import MAX_ID
from rayrec.serving.service import Service
from rayrec.serving.user_schemas import PlaysTaken, SentPlays, UserTaste
from rayrec.serving.users import take_plays, user_taste


def users(service: Service) -> APIRouter:
    """New plays of users, and where they stand."""
    router = APIRouter(prefix="/v1", tags=["users"], responses=documented(*DOCUMENTED))

    @router.post("/plays", response_model=PlaysTaken)
    async def plays(request: SentPlays) -> Response:
        """Take one play or many, of any users; the next answer for a user reflects them.

        Plays may be sent again with the same event ids, and come out of order: those among a user's last 64 are put
        in their place, older ones are rejected. When the answer is here they are stored.
        """
        return as_json(await take_plays(service.states, service.live, service.metrics, request.plays))

    # The id as a path: it may hold slashes.
    @router.get("/users/{user_id:path}/taste", response_model=UserTaste)
    async def taste(
        user_id: Annotated[str, Path(min_length=1, max_length=MAX_ID)],
        at: Annotated[
            str | None,
            Query(min_length=1, max_length=40, description="ISO 8601 with a zone, or unix seconds or ms; now."),
        ] = None,
    ) -> Response:
        """The taste vectors of a stored user."""
        return as_json(await user_taste(service.states, service.live, user_id, at))

    return router
