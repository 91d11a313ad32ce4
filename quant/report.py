"""A report on the layers of a model: what format each has, its size and its error."""

from collections.abc import Sequence

from .record import LayerRecord

MIB = 1 << 20


def bits_per_weight(records: Sequence[LayerRecord]) -> float:
    """Return stored bits per weight over all linear layers, scales included; 0 for none."""
    elements = sum(r.shape[0] * r.shape[1] for r in records)
    return 8 * sum(r.size_bytes for r in records) / elements if elements else 0.0


def table(records: Sequence[LayerRecord]) -> str:
    """Return a text table: a summary line per format, then every layer."""
    groups: dict[str, list[LayerRecord]] = {}
    for record in records:
        groups.setdefault(record.format or "kept", []).append(record)
    lines = [
        f"{'format':<18} {'layers':>6} {'MiB':>10} {'bits':>6} {'mean error':>11} {'worst':>9}"
    ]
    for name, group in groups.items():
        errors = [r.error for r in group if r.error is not None]
        mean = f"{sum(errors) / len(errors):.5f}" if errors else "-"
        worst = f"{max(errors):.5f}" if errors else "-"
        size = sum(r.size_bytes for r in group) / MIB
        lines.append(
            f"{name:<18} {len(group):>6} {size:>10.2f} {bits_per_weight(group):>6.2f} "
            f"{mean:>11} {worst:>9}"
        )
    lines.append("")
    width = max((len(r.name) for r in records), default=5)
    lines.append(f"{'layer':<{width}} {'format':<18} {'shape':<14} {'MiB':>8} {'error':>8}  reason")
    for r in records:
        shape = " x ".join(map(str, r.shape))
        error = "-" if r.error is None else f"{r.error:.5f}"
        lines.append(
            f"{r.name:<{width}} {r.format or 'kept':<18} {shape:<14} {r.size_bytes / MIB:>8.2f} "
            f"{error:>8}  {r.reason}".rstrip()
        )
    return "\n".join(lines)
