"""What of a script's words must not be copied into a job file: tokens, keys and passwords."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SECRET = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_ASSIGNED = re.compile(r"(-*)([\w-]+)=(.*)", re.DOTALL)
_LOGIN_OPTIONS = {"k"}
"""Short options of the trackers' logins that take the key."""
_HEADER_OPTIONS = {"H", "header", "u", "user"}
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_IN_QUERY = re.compile(r"(?<=[?&])([\w.-]*(?:token|key|secret|password|signature|credential)[\w.-]*)=[^&\s]*", re.IGNORECASE)
_HIDDEN = "***"


def is_secret(name: str) -> bool:
    """Whether a variable or option of this name holds a secret."""
    return _SECRET.search(name.replace("-", "_")) is not None


def hide_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command, with *** in place of what only the user may see."""
    shown = []
    is_login = "login" in words[:3]
    hides_next = after_login = False
    for word in words:
        option = word.lstrip("-") if word.startswith("-") else None
        if hides_next or (is_login and after_login and option is None):
            shown.append(_HIDDEN)
            hides_next = False
            continue
        after_login |= word == "login"
        hides_next = option is not None and (
            is_secret(option) or option in _HEADER_OPTIONS or (is_login and option in _LOGIN_OPTIONS)
        )
        shown.append(_hide_inside(word))
    return shown


def _hide_inside(word: str) -> str:
    assigned = _ASSIGNED.fullmatch(word)
    if assigned is not None and (is_secret(assigned[2]) or (assigned[1] and assigned[2] in _HEADER_OPTIONS)):
        return f"{assigned[1]}{assigned[2]}={_HIDDEN}"
    return _IN_QUERY.sub(rf"\1={_HIDDEN}", _IN_URL.sub(_HIDDEN, word))
