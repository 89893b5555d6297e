"""Numbers as words."""

from collections.abc import Iterable

from ..tables import seconds

__all__ = ["counted", "date", "megabytes", "percent", "percents", "rate", "seconds", "times", "timeses"]


def times(ratio: float) -> str:
    """Format with three digits: ``1.86x``"""
    return (
        f"{ratio:.0f}x"
        if ratio >= 99.5
        else f"{ratio:.1f}x"
        if ratio >= 9.95
        else f"{ratio:.2f}x"
        if ratio >= 0.01
        else f"{ratio:.1g}x"
    )


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.2%}"


def timeses(ratios: Iterable[float]) -> str:
    """Format as a range: 1.08 to 3.46x"""
    return _range(ratios, times, "x")


def percents(shares: Iterable[float]) -> str:
    return _range(shares, percent, "%")


def _range(values, word, unit: str) -> str:
    low, high = word(min(values := list(values))), word(max(values))
    return low if low == high else f"{low.removesuffix(unit)} to {high}"


def rate(value: float) -> str:
    """Format with an SI prefix: ``200 G``"""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def megabytes(nbytes: float) -> str:
    return (
        f"{nbytes / 1e9:.2f} GB"
        if nbytes >= 1e9
        else f"{nbytes / 1e6:,.0f} MB"
        if nbytes >= 1e7
        else f"{nbytes / 1e6:.2g} MB"
    )


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def date(environment: dict) -> str:
    return environment["date"][:10]
