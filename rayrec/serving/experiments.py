"""Which arm of an experiment a request belongs to, and what it is answered with."""

from collections.abc import Mapping
from dataclasses import dataclass

from rayrec.serving.live_release import LiveRelease
from rayrec.serving.schemas import RecommendationsRequest
from rayrec.serving.serve_config import Experiment


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A request with the settings of its arm."""

    sent: RecommendationsRequest  # as its client sent it
    request: RecommendationsRequest
    release: LiveRelease  # that answers
    experiment: str | None = None
    arm: str | None = None


class Arms:
    """The arms of an application; without an experiment the live release answers all requests as they are."""

    def __init__(self, experiment: Experiment | None, releases: Mapping[str, LiveRelease]) -> None:
        """`releases` holds those that arms name, by id."""
        self._experiment, self._releases = experiment, releases

    @property
    def releases(self) -> list[LiveRelease]:
        """Those that arms name."""
        return list(self._releases.values())

    def assign(self, request: RecommendationsRequest, live: LiveRelease) -> Assigned:
        """A request as its user's arm has it.

        A request outside of the experiment is answered as it is: one without a stored user, or one that sets anything
        that the arms differ in.
        """
        experiment = self._experiment
        if experiment is None or not request.user_id or request.model_fields_set & experiment.varied:
            return Assigned(sent=request, request=request, release=live)
        name = experiment.arm_of(request.user_id)
        if name is None:
            return Assigned(sent=request, request=request, release=live)
        arm = experiment.arms[name]
        return Assigned(
            sent=request,
            request=request.model_copy(update=arm.settings),
            release=self._releases[arm.release] if arm.release else live,
            experiment=experiment.name,
            arm=name,
        )
