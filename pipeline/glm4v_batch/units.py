"""Bytes, rates and durations as people read them. Nowhere else are numbers turned into such text."""

GIB = 1024**3
_KIB = 1024


def format_bytes(num_bytes: float) -> str:
    """*num_bytes* in the largest binary unit that leaves at least one whole.

    >>> format_bytes(20_585_554_944), format_bytes(900)
    ('19.17 GiB', '900 B')
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < _KIB:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= _KIB
    return f"{size:.2f} TiB"


def format_seconds(seconds: float) -> str:
    """*seconds* as a person says it.

    >>> format_seconds(7.25), format_seconds(75), format_seconds(7500)
    ('7.2 s', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_count(count: int, noun: str) -> str:
    """*count* with *noun* in the right number.

    >>> format_count(1, "row"), format_count(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
