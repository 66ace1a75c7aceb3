"""Tables."""

from __future__ import annotations

from collections.abc import Iterable

from astropy.table import Table

from stampworker.formats.alerts import from_table, masked_column
from stampworker.formats.packets import METRICS, Packet
from stampworker.formats.rejects import Reject

__all__ = ["from_table", "results_table"]


def results_table(table: Table, results: Iterable[Packet | Reject]) -> Table:
    """Add the metrics to a table of candidates.

    Parameters
    ----------
    table : astropy.table.Table
        One row a candidate; not modified.
    results : iterable of Packet or Reject
        One a row.

    Returns
    -------
    table : astropy.table.Table
        With ``alertId``, ``packetId``, the columns ``adjust_*`` (masked where there is no fit) and ``reject``, the
        reason why a row has no packet, else empty.
    """
    listed = list(results)
    out = table.copy()
    packets = [r if isinstance(r, Packet) else None for r in listed]
    out["alertId"] = [r.alert_id or "" for r in listed]
    out["packetId"] = [p.packet_id if p else "" for p in packets]
    for name in METRICS:
        kind: type = {"adjust_df": int, "adjust_bound": str}.get(name, float)
        out[name] = masked_column([p.metrics.get(name) if p else None for p in packets], kind)
    out["adjust_status"] = masked_column([p.adjust_status if p else None for p in packets], str)
    out["adjust_artefact"] = masked_column([p.adjust_artefact if p else None for p in packets], bool)
    out["reject"] = [f"{type(r.error).__name__}: {r.error}" if isinstance(r, Reject) else "" for r in listed]
    return out
