"""Releases: one id for a data set, split, song embeddings, model, tastes and index. At most one release is live.

A release copies nothing. It names its parts and holds the checksums of their manifests, which in turn hold the
checksums of the files, so `verify_release` finds any changed byte. Of the data set's manifest it holds the checksum of
the content alone: another import of the same plays changes the rest.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from rayrec.errors import DamagedArtifactError, InputError, MismatchError, NotFoundError
from rayrec.storage import artifacts
from rayrec.storage.artifacts import (
    DatasetManifest,
    Manifest,
    content_checksum,
    dataset_checksums,
    earlier_version,
    fingerprint,
    new_id,
    publish,
    read_dataset_manifest,
    read_staged_manifests,
    sha256,
)
from rayrec.storage.workspace import (
    DATASET,
    DATASET_MANIFEST,
    HISTORIES,
    SONGS_TABLE,
    Workspace,
    artifact_dir,
    earlier_manifest,
    split_file,
)

KIND = "releases"
VALIDATION = "validation"  # key of a release's metrics: verdict, queries and figures measured before the last fit
ACTIVE = "releases/active"  # JSON: the keys of `read_active`
SONGS_FILE = SONGS_TABLE.removeprefix(f"{DATASET}/")
CHECKSUMS = "checksums.json"  # path in the workspace -> sha256; of dataset.json it is the `content_checksum`
# Files below dataset/ that do not change when plays are appended or playlists replaced.
FIXED_PREFIXES = ("rejected/plays-", "earlier/")
PART_KINDS = ("songs", "models", "added_songs", "retrieval", "rankers", "tastes", "indexes")
ANSWERING_KINDS = ("models", "added_songs", "indexes", "retrieval", "rankers")  # of parts that recommend; tastes do not
# A release without rankers answers with the network alone, and one without added songs only with the songs of its
# training. A network trained without song embeddings has none.
OPTIONAL_KINDS = ("songs", "added_songs", "retrieval", "rankers")
# (kind, role) of inputs that may differ from those of the release: a retrieval that is fitted every night serves older
# rankers and models, and a training that continues on later plays keeps its embeddings.
INPUTS_THAT_MAY_DIFFER = (("rankers", "retrieval"), ("retrieval", "split"), ("songs", "split"))


def create_release(
    workspace: Workspace,
    *,
    model_id: str | None = None,
    tastes_id: str | None = None,
    index_id: str | None = None,
    rankers_id: str | None = None,
    retrieval_id: str | None = None,
    activate: bool = True,
    metrics: Mapping[str, Any] | None = None,
) -> Manifest:
    """Bundle a model, its song embeddings, tastes, index, rankers, retrieval and the data set under one id.

    Parts that are not named are those requested last: the model of the data set, its tastes, index, added songs and
    rankers, and the retrieval with which the rankers were trained. The same parts make the same release. `metrics` are
    kept in the manifest of a new release.

    Raises `NotFoundError` if a part is missing, `MismatchError` if named parts do not belong together.
    """
    dataset = read_dataset_manifest(workspace)
    part_ids = {"models": model_id, "rankers": rankers_id, "tastes": tastes_id, "indexes": index_id}
    given_parts = {
        kind: artifacts.load_manifest(workspace, kind, part) for kind, part in part_ids.items() if part is not None
    }
    model = given_parts.get("models") or _model_of(workspace, dataset, given_parts)
    parts = {
        "models": model,
        "tastes": given_parts.get("tastes") or _require_part_of(workspace, "tastes", model),
        "indexes": given_parts.get("indexes") or _require_part_of(workspace, "indexes", model),
    }
    if "songs" in model.inputs:
        parts["songs"] = artifacts.load_manifest(workspace, "songs", model.inputs["songs"])
    rankers = given_parts.get("rankers") or _last_part_of(workspace, "rankers", model)
    added_songs = _last_part_of(workspace, "added_songs", model)
    if added_songs is not None:
        parts["added_songs"] = added_songs
    if rankers is not None:
        retrieval = artifacts.load_manifest(workspace, "retrieval", retrieval_id or rankers.inputs["retrieval"])
        parts |= {"rankers": rankers, "retrieval": retrieval}
    inputs = {"dataset": dataset.id, **{kind: part.id for kind, part in parts.items()}}
    if "split" in model.inputs:
        inputs["split"] = model.inputs["split"]
    require_matching_parts(dataset, inputs, parts.values())
    release = _publish_release(workspace, dataset, inputs, metrics or {})
    if activate:
        activate_release(workspace, release.id)
    return release


def require_matching_parts(dataset: DatasetManifest, inputs: dict[str, str], parts: Any) -> None:
    """Raise `MismatchError` if a part was made from other artifacts than `inputs` (role -> id).

    A part may have been made from a data set that the current one descends from.
    """
    for part in parts:
        for role, input_id in part.inputs.items():
            if (part.kind, role) in INPUTS_THAT_MAY_DIFFER:
                continue
            # Songs that are added later do not change the songs added before, nor the taste vectors of their plays.
            descends = (role == "dataset" and dataset.descends_from(input_id)) or role == "added_songs"
            if role in inputs and inputs[role] != input_id and not descends:
                raise MismatchError(
                    f"{artifacts.noun(part.kind)} {part.id} was made from {artifacts.noun(role)} {input_id}, not from "
                    f"{inputs[role]}; choose matching artifacts, or run `rayrec {artifacts.COMMANDS[part.kind]}` again"
                )


def list_releases(workspace: Workspace) -> list[Manifest]:
    """Return all releases, oldest first."""
    return artifacts.listing(workspace, KIND)


def active_release(workspace: Workspace) -> Manifest | None:
    """Return the live release; None if none was activated.

    Raises `NotFoundError` if its folder is missing, or if another version of rayrec made it.
    """
    active = read_active(workspace)["active"]
    if active is None:
        return None
    try:
        return artifacts.load_manifest(workspace, KIND, active)
    except (NotFoundError, DamagedArtifactError) as error:
        reason = str(error).partition("; ")[0]
        raise NotFoundError(
            f"the live release cannot be used ({reason}); run `rayrec fit` or `rayrec release create`"
        ) from error


def is_active(workspace: Workspace, release_id: str) -> bool:
    """Return True if a release is the live one."""
    return bool(read_active(workspace)["active"] == release_id)


def activate_release(workspace: Workspace, release_id: str) -> Manifest:
    """Make a release the live one.

    Raises `NotFoundError` if it does not exist, and `MismatchError` if its data set was replaced.
    """
    release = artifacts.load_manifest(workspace, KIND, release_id)
    require_dataset_of(workspace, release)
    state = read_active(workspace)
    history = state["history"]
    if state["active"] not in (None, release.id):
        history = [*history, state["active"]]
    rolled_back = [rolled_back_id for rolled_back_id in state["rolled_back"] if rolled_back_id != release.id]
    write_active(workspace, release.id, history, rolled_back)
    return release


def rollback(workspace: Workspace) -> Manifest:
    """Make the previously live release live again; `update` does not make the release it replaces live by itself.

    Raises `InputError` if there was none, and `MismatchError` if its data set was replaced.
    """
    state = read_active(workspace)
    if not state["history"]:
        raise InputError(
            f"No earlier release to roll back to (live: {state['active'] or 'none'}); "
            "see `rayrec release list` and use `rayrec release activate ID`"
        )
    *history, previous_id = state["history"]
    release = artifacts.load_manifest(workspace, KIND, previous_id)
    require_dataset_of(workspace, release)
    rolled_back = {*state["rolled_back"], state["active"]} - {None, previous_id}
    write_active(workspace, previous_id, history, sorted(rolled_back))
    return release


def require_dataset_of(workspace: Workspace, release: Manifest) -> None:
    """Raise `MismatchError` if the data set of a release was replaced: its song rows are those of other songs now."""
    dataset, dataset_id = read_dataset_manifest(workspace), release.inputs["dataset"]
    if not dataset.descends_from(dataset_id):
        raise MismatchError(
            f"release {release.id} was made from data set {dataset_id}, which data set {dataset.id} has replaced; "
            "make a new release with `rayrec fit`"
        )


def read_active(workspace: Workspace) -> dict[str, Any]:
    """Return `active`, `history`, `rolled_back` and `change`.

    `active` is the live id or None, `history` are the earlier live ids, oldest first, and `rolled_back` the ids that
    were rolled back and not activated since. `change` is a unique id of the last activation. It shows followers that a
    release was activated again, even if it is the same release.
    """
    state: dict[str, Any] = {"active": None, "history": [], "rolled_back": [], "change": ""}
    if workspace.exists(ACTIVE):
        state |= workspace.read_json(ACTIVE)
    return state


def write_active(
    workspace: Workspace, release_id: str | None, history: Sequence[str], rolled_back: Sequence[str]
) -> None:
    """Make a release, or none, the live one, with a new `change` id; the other values are those of `read_active`."""
    state = {"active": release_id, "history": list(history), "rolled_back": list(rolled_back)}
    workspace.write_json(ACTIVE, {**state, "change": uuid.uuid4().hex})


def verify_release(
    workspace: Workspace,
    release: Manifest,
    kinds: Sequence[str] = PART_KINDS,
    *,
    plays: bool = True,
    once_per_node: bool = False,
) -> None:
    """Compare every file of every part with its checksum. Raises `DamagedArtifactError` for the first that differs.

    For parts not in `kinds` only the manifest is compared, and without `plays` the histories are left out, so that a
    process that loads neither tastes nor plays does not read those of millions of users. With `once_per_node`, only one
    process of a node reads each version of a file.

    If plays were appended to the data set after the release, only the plays of the release are compared. Playlists are
    not compared, since a release does not read them and they may be replaced.
    """
    artifacts.verify(workspace, release, once_per_node=once_per_node)
    for path, expected in release_files(workspace, release).items():
        if plays or not path.startswith(HISTORIES):
            _verify_checksum(workspace, path, expected, once_per_node)
    for kind in kinds:
        if kind in OPTIONAL_KINDS and kind not in release.inputs:
            continue
        artifacts.verify(
            workspace, artifacts.load_manifest(workspace, kind, release.inputs[kind]), once_per_node=once_per_node
        )


def release_files(workspace: Workspace, release: Manifest) -> dict[str, str]:
    """Return path -> sha256 of the manifests of parts, the split and the data set files of a release.

    The files of its artifacts are not included. Raises `DamagedArtifactError` if the data set is missing or replaced,
    or if its manifest describes other content than when the release was made.
    """
    if not workspace.exists(DATASET_MANIFEST):
        raise DamagedArtifactError(f"{DATASET_MANIFEST} is missing; restore it or import the data again")
    dataset, dataset_id = read_dataset_manifest(workspace), release.inputs["dataset"]
    files = dict(workspace.read_json(release.path(CHECKSUMS)))
    if not dataset.descends_from(dataset_id):
        raise DamagedArtifactError(
            f"data set {dataset_id} of release {release.id} was replaced by {dataset.id}; create a new release"
        )
    release_dataset = earlier_version(workspace, dataset, dataset_id)
    if content_checksum(release_dataset) != files.pop(DATASET_MANIFEST):
        raise _changed_error(DATASET_MANIFEST if dataset_id == dataset.id else earlier_manifest(dataset_id))
    checksums = dataset_checksums(workspace, dataset, read_staged_manifests(workspace))
    dataset_files = {path: digest for path, digest in release_dataset.files.items() if path.startswith(FIXED_PREFIXES)}
    # Later songs are appended to songs.parquet, and an import of playlists moves songs from separate files into it, so
    # the current files and checksums apply.
    dataset_files |= {
        path: checksums[f"{DATASET}/{path}"]
        for path in release_dataset.files
        if path.startswith((SONGS_FILE, "songs/")) and path in dataset.files
    }
    # Parts may have been joined after the release: their plays are in the current files.
    parts_end = f"histories/part={release_dataset.parts:04d}"
    dataset_files |= {
        path: digest for path, digest in dataset.files.items() if path.startswith("histories/") and path < parts_end
    }
    return files | {f"{DATASET}/{name}": digest for name, digest in dataset_files.items()}


def default_parts(workspace: Workspace, model_id: str | None = None) -> dict[str, str]:
    """Return role -> id of the parts to answer with.

    They are the parts of the live release, or those of the current model without a live release, or those of `model_id`
    if it is given and is not the live model. The parts of the live release include its id as `releases`. Tastes and
    index are included only if they exist for the model.
    Raises `NotFoundError` for an unknown model, or with the command to run first if there is no model.
    """
    release = active_release(workspace)
    if release is not None and model_id in (None, release.inputs["models"]):
        return {KIND: release.id, **release.inputs}
    if model_id is None:
        model = artifacts.newest(workspace, "models")
    else:
        model = artifacts.load_manifest(workspace, "models", model_id)
    return parts_of(workspace, model)


def parts_of(workspace: Workspace, model: Manifest) -> dict[str, str]:
    """Return role -> id of a model and of the parts made with it that were requested last.

    The live release is not considered.
    """
    part_ids = {**model.inputs, "models": model.id}
    for kind in ("tastes", "indexes", "rankers", "added_songs"):
        part = _last_part_of(workspace, kind, model)
        if part is not None:
            part_ids[kind] = part.id
            if kind == "rankers":
                part_ids["retrieval"] = part.inputs["retrieval"]
    return part_ids


def _model_of(workspace: Workspace, dataset: DatasetManifest, given_parts: dict[str, Manifest]) -> Manifest:
    """Return the model that the named parts were made with, or else the last requested model of the data set."""
    if given_parts:
        return artifacts.load_manifest(workspace, "models", next(iter(given_parts.values())).inputs["models"])
    model = artifacts.latest(
        workspace, "models", lambda manifest: dataset.descends_from(manifest.inputs.get("dataset", ""))
    )
    if model is None:
        raise NotFoundError(f"Data set {dataset.id} has no model; run `rayrec train` first")
    return model


def _last_part_of(workspace: Workspace, kind: str, model: Manifest) -> Manifest | None:
    """Return the part of a kind that was made with the model and requested last; None if there is none."""
    return artifacts.latest(workspace, kind, lambda part: part.inputs.get("models") == model.id)


def _require_part_of(workspace: Workspace, kind: str, model: Manifest) -> Manifest:
    part = _last_part_of(workspace, kind, model)
    if part is None:
        advice = f"run `rayrec {artifacts.COMMANDS[kind]} --model {model.id}` first"
        raise NotFoundError(f"model {model.id} has no {artifacts.noun(kind)}; {advice}")
    return part


def _publish_release(
    workspace: Workspace, dataset: DatasetManifest, inputs: dict[str, str], metrics: Mapping[str, Any]
) -> Manifest:
    paths = [f"{artifact_dir(kind, inputs[kind])}/manifest.json" for kind in PART_KINDS if kind in inputs]
    if "split" in inputs:
        paths.append(split_file(inputs["split"]))
    checksums = {DATASET_MANIFEST: content_checksum(dataset)} | {path: sha256(workspace, path) for path in paths}
    # Parts that were deleted and made again under the same ids have other checksums and give another release.
    release_id, is_complete = new_id(workspace, KIND, fingerprint("release", checksums, inputs), repeat=False)
    if is_complete:
        return artifacts.reuse(workspace, KIND, release_id)
    manifest = Manifest(kind=KIND, id=release_id, inputs=inputs, metrics=dict(metrics))
    workspace.write_json(manifest.path(CHECKSUMS), checksums)
    return publish(workspace, manifest, [CHECKSUMS])


def _verify_checksum(workspace: Workspace, path: str, expected: str, once_per_node: bool) -> None:
    if not workspace.exists(path):
        raise DamagedArtifactError(f"{path} is missing; restore it, or run `rayrec release create`")
    if (workspace.sha256_on_node(path) if once_per_node else sha256(workspace, path)) != expected:
        raise _changed_error(path)


def _changed_error(path: str) -> DamagedArtifactError:
    return DamagedArtifactError(f"{path} changed since the release; restore it, or run `rayrec release create`")
