"""API keys by role: read recommendations, write plays, administer.

Keys come from the environment or a file, in the replica itself: they pass through no argument, which Ray
would show on its dashboard. Only digests are kept.
"""

import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from rayrec.errors import InputError
from rayrec.serving.serve_config import ServeConfig, is_loopback

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
GRANTS: dict[Role, tuple[Role, ...]] = {"read": ("read",), "write": ("write",), "admin": ROLES}  # admin may do all
VARIABLE = "RAYREC_API_KEYS"  # of the application: role:key or role+role:key, separated by commas
SHORTEST = 16  # characters of a key


@dataclass(frozen=True, repr=False)
class Keys:
    """The digests of all keys with their roles; none: everybody may do everything."""

    digests: tuple[tuple[bytes, Role], ...] = ()  # one entry for each role of a key

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self.digests)

    def roles(self, authorization: str | None) -> set[Role]:
        """The roles of an Authorization header; none for a wrong or missing key.

        All digests are compared, whichever fits, so that the time does not depend on the key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "replace")).digest()
        roles: set[Role] = set()
        for known, role in self.digests:
            if hmac.compare_digest(known, digest):
                roles.update(GRANTS[role])
        return roles if scheme.lower() == "bearer" else set()


def load_keys(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of the environment and of the config's file.

    Raises `InputError` for what does not read as keys, and where there are none though others than this
    machine may reach the application.
    """
    entries = list(_entries(environment.get(VARIABLE, "").replace(",", "\n").splitlines(), VARIABLE))
    if config.keys_file:
        try:
            text = Path(config.keys_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"keys file {config.keys_file} cannot be read: {error}") from error
        entries += _entries(text.splitlines(), config.keys_file)
    if not entries and not is_loopback(config.host):
        raise InputError(
            f"serving on {config.host} without API keys would give everybody access; set {VARIABLE}=read:KEY,write:KEY "
            "or give --keys-file, or serve on 127.0.0.1"
        )
    return Keys(tuple(entries))


def _entries(lines: Iterable[str], where: str) -> Iterable[tuple[bytes, Role]]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        names, colon, key = text.partition(":")
        roles, key = [name.strip() for name in names.split("+")], key.strip()
        if not colon or not set(roles) <= set(ROLES) or any(char.isspace() for char in key):
            raise InputError(f"{where}, entry {number} is not role:key or role+role:key; roles are {', '.join(ROLES)}")
        if len(key) < SHORTEST:
            raise InputError(f"{where}, entry {number} has a key of {len(key)} characters; give at least {SHORTEST}")
        for role in roles:
            yield sha256(key.encode()).digest(), role  # type: ignore[misc]
