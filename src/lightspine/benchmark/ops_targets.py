"""What the scans are to reach, and whether they do."""

from collections.abc import Iterator
from dataclasses import dataclass

from lightspine.benchmark.ops_cases import ScanCase
from lightspine.benchmark.ops_memory import ScanMemory
from lightspine.benchmark.ops_time import BLOCKED, FLOOR, REFERENCE, SCAN, SCAN_TRAINING
from lightspine.benchmark.resident import RESOLUTION_BYTES
from lightspine.benchmark.scan_share import ScanShare
from lightspine.benchmark.turns import Timing

AT_MOST, AT_LEAST = "at most", "at least"
_LONG = 3136
_SHARES = {"vmamba_tiny": 0.25, "vim_tiny": 0.5}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One target and what was measured.

    Attributes:
        what: the ratio that has a target.
        where: shape and batch, or model.
        value: the measured ratio.
        rule: "at most" or "at least".
        limit: the target.
        met: `None` where the measurement is too coarse to tell.
    """

    what: str
    where: str
    value: float
    rule: str
    limit: float
    met: bool | None


def check_row(
    case: ScanCase, batch: int, times: dict[str, Timing], memory: ScanMemory | None
) -> Iterator[Check]:
    """Yield every target of a scan that its measurements can be held against."""
    where = f"{case.name}, batch {batch}"
    if times:
        scan = times[SCAN].median_ms
        yield _check("forward / floor", where, scan / times[FLOOR].median_ms, AT_MOST, 1.0)
        yield _check("torch / forward", where, times[BLOCKED].median_ms / scan, AT_LEAST, 2.0)
        training = times[SCAN_TRAINING].median_ms
        yield _check("forward and backward / forward", where, training / scan, AT_MOST, 4.0)
        if REFERENCE in times and case.length >= _LONG:
            reference = times[REFERENCE].median_ms
            yield _check("reference / forward", where, reference / scan, AT_LEAST, 20.0)
    if memory is not None:
        yield _check_bytes("peak of forward / outputs", where, memory.forward, memory.outputs, 1.05)
        yield _check_bytes("peak of backward / inputs", where, memory.backward, memory.inputs, 3.0)


def check_share(name: str, share: ScanShare) -> Check:
    """Hold the share of the scans in a model against its target."""
    return _check("scans / forward of the model", name, share.share, AT_MOST, _SHARES[name])


def _check(what: str, where: str, value: float, rule: str, limit: float) -> Check:
    met = value <= limit if rule == AT_MOST else value >= limit
    return Check(what=what, where=where, value=value, rule=rule, limit=limit, met=met)


def _check_bytes(what: str, where: str, measured: int, unit: int, limit: float) -> Check:
    met: bool | None = measured <= limit * unit
    if abs(measured - limit * unit) <= RESOLUTION_BYTES:
        met = None
    return Check(what=what, where=where, value=measured / unit, rule=AT_MOST, limit=limit, met=met)
