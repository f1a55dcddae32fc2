"""What an import came to, so that a person sees at once where something is off."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from rayrec.errors import InputError
from rayrec.importing.fragments import UnitResult
from rayrec.importing.import_plan import ImportPlan

FEW_REJECTED = 0.01  # share of the rows up to which nothing is said
OUTLIER = 10  # times the median number of rows a file, or a tenth of it
OUTLIERS_SHOWN = 5
TEXT_SHOWN = 120  # characters of a rejected row


@dataclass(frozen=True, kw_only=True)
class RejectedRows:
    """The rows that were rejected for one reason."""

    reason: str
    rows: int
    share: float  # of all rows read
    source: str  # file of the first of them
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """Counts over the files of one import."""

    files: int
    bytes: int  # as they are stored
    read: int  # rows, good and bad
    rejected: int  # rows that are no plays, or could not be read
    beside: int  # of them those that the format holds beside plays, such as podcasts
    reasons: list[RejectedRows]  # most frequent first
    rows_per_file: list[int]  # least, median and most usable rows of a file
    outliers: dict[str, int]  # files with a tenth or ten times the usable rows of the median file
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why it was left out
    warnings: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Rejected rows among all rows read, without those that the format holds beside plays."""
        return (self.rejected - self.beside) / max(1, self.read - self.beside)

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class TooManyRejectedError(InputError):
    """More rows were rejected than the settings allow; nothing was imported."""

    def __init__(self, message: str, summary: ImportSummary) -> None:
        super().__init__(message)
        self.summary = summary

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.summary)


def summarize(
    plan: ImportPlan, units: Sequence[UnitResult], rejected: Iterable[tuple[int, pa.Table]], beside: Sequence[str] = ()
) -> ImportSummary:
    """Count what the units came to; `rejected` is unit by unit columns.REJECTED, with lines from the unit's start.

    `beside` are the reasons of rows that the format holds beside plays.
    """
    damaged = plan.damaged
    rows: dict[str, int] = {file.source: 0 for file in plan.files}
    counts: dict[str, int] = {}
    for file, unit in zip(plan.unit_files, units, strict=True):
        rows[plan.files[file].source] += unit.kept
        for reason, count in unit.rejected.items():
            counts[reason] = counts.get(reason, 0) + count
    read = sum(unit.read for unit in units)
    examples = _examples(plan, units, rejected, set(counts))
    reasons = [
        RejectedRows(reason=reason, rows=counts[reason], share=counts[reason] / read, **examples[reason])
        for reason in sorted(counts, key=lambda reason: -counts[reason])
    ]
    kept = {source: count for source, count in rows.items() if source not in damaged}
    median = statistics.median(kept.values()) if kept else 0
    outliers = {
        source: count
        for source, count in kept.items()
        if len(kept) > 2 and (count * OUTLIER <= median or count >= median * OUTLIER)
    }
    summary = ImportSummary(
        files=len(rows),
        bytes=sum(file.size for file in plan.files),
        read=read,
        rejected=sum(counts.values()),
        beside=sum(counts.get(reason, 0) for reason in beside),
        reasons=reasons,
        rows_per_file=[min(kept.values()), round(median), max(kept.values())] if kept else [],
        outliers=dict(sorted(outliers.items(), key=lambda item: item[1])[:OUTLIERS_SHOWN]),
        damaged=damaged,
        warnings=list(plan.notes),
    )
    if summary.share > FEW_REJECTED:
        lost = summary.rejected - summary.beside
        summary.warnings.append(f"{lost:,} of {read - summary.beside:,} rows ({summary.share:.1%}) were rejected.")
    if damaged:
        left_out = f"{len(damaged):,} of {len(rows):,} files could not be read to their end and were left out."
        summary.warnings.append(left_out)
    return summary


def _examples(
    plan: ImportPlan, units: Sequence[UnitResult], rejected: Iterable[tuple[int, pa.Table]], wanted: set[str]
) -> dict[str, dict[str, Any]]:
    """The first row of each reason."""
    found: dict[str, dict[str, Any]] = {}
    offsets = plan.line_offsets([unit.lines for unit in units])
    if not wanted:
        return found
    for number, table in rejected:
        for reason in wanted - set(found):
            index = table.column("reason").index(reason).as_py()
            if index >= 0:
                row = table.slice(index, 1).to_pylist()[0]
                text = str(row["text"])[:TEXT_SHOWN]
                found[reason] = {"source": row["source"], "line": row["line"] + offsets[number], "text": text}
        if wanted <= set(found):
            break
    return found
