"""The formats of JSON strings that can be enforced, as regular expressions without look-around.

llguidance's own are kept where they are exact; here are the others. Sources: RFC 3339 (dates and times), RFC 5321
(addresses of mail), RFC 4291 (IPv6).
"""

import functools

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_FRACTION = r"(?:\.[0-9]+)?"

_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP = "[0-9A-Fa-f]{1,4}"
_TAIL = f"(?:{_GROUP}:{_GROUP}|{_IPV4})"  # the last 32 bits


def _ipv6() -> str:
    """Eight groups, the last two of which may be an IPv4 address; "::" once stands for at least one group of zeros."""
    found = [f"(?:{_GROUP}:){{6}}{_TAIL}"]
    for before in range(7):
        head = f"(?:{_GROUP}:){{{before - 1}}}{_GROUP}" if before else ""
        room = 7 - before  # groups that may follow
        tails = [f"(?:{_GROUP}:){{0,{room - 1}}}{_GROUP}"] if room else []
        if room >= 2:
            tails.append(f"(?:{_GROUP}:){{0,{room - 2}}}{_IPV4}")
        found.append(f"{head}::(?:{'|'.join(tails)})?")
    found.append(f"(?:{_GROUP}:){{6}}{_GROUP}::")
    return f"(?:{'|'.join(found)})"


_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


def _email() -> str:
    quoted = r'"(?:[ !#-\[\]-~]|\\[ -~])*"'
    literal = rf"\[(?:{_IPV4}|IPv6:{_ipv6()})\]"
    return rf"(?:{_ATOM}(?:\.{_ATOM})*|{quoted})@(?:{_LABEL}(?:\.{_LABEL})*|{literal})"


def _leap_seconds() -> str:
    """They come at the end of a day in UTC: whatever the offset, the local time less the offset is 23:59:60."""
    found = [f"23:59:60{_FRACTION}[Zz]"]
    for sign in (1, -1):
        for hour in range(24):
            by_hour: dict[int, list[str]] = {}
            for minute in range(60):
                local = (23 * 60 + 59 + sign * (60 * hour + minute)) % 1440
                ending = f"{local % 60:02d}:60{_FRACTION}{'[+]' if sign > 0 else '-'}{hour:02d}:{minute:02d}"
                by_hour.setdefault(local // 60, []).append(ending)
            found += [f"{local:02d}:(?:{'|'.join(endings)})" for local, endings in by_hour.items()]
    return "|".join(found)


def _time() -> str:
    offset = "(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    return f"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]{_FRACTION}{offset}|{_leap_seconds()})"


@functools.cache
def format_pattern(name: str) -> str | None:
    """A regular expression (Rust's syntax, anchored) of the strings of a format; None for one that is not defined
    here."""
    makers = {
        "date": lambda: _DATE,
        "time": _time,
        "date-time": lambda: f"{_DATE}[Tt]{_time()}",
        "email": _email,
        "ipv6": _ipv6,
    }
    return f"^{makers[name]()}$" if name in makers else None
