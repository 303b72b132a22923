"""Addresses without the passwords in them: everything that is written, shown or sent goes through here.

Only the connection itself sees them.
"""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_PARAMETER = re.compile(r"(?i)([?&](?:password|passwd|pwd|token|secret|[\w-]*signature|[\w-]*key)=)[^&\s'\"]+")
_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """Return a text whose addresses have neither a user and password nor the values of parameters that are secret."""
    return _PARAMETER.sub(r"\1", _USER.sub("", text))


def names_a_secret(name: str) -> bool:
    """Whether an environment variable of this name may hold a secret."""
    return _NAME.search(name) is not None
