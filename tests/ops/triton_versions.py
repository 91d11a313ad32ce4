"""The Tritons that the kernels are compiled with: those that torch 2.9 to 2.15 bring on PyPI.

Run as a program, it names those that `make test` installs beside the one that comes with the rest.
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Version:
    """torch: the versions that ask for this Triton. python: the first that it is made for.

    spilled_bytes: local memory of one thread at most, over all kernels and architectures: what its
    255 registers do not hold. Tiles and warps were chosen with Triton 3.6, where that is none.
    """

    torch: tuple[str, ...]
    spilled_bytes: int = 0
    python: tuple[int, int] = (3, 10)


VERSIONS = {
    "3.5.0": Version(("2.9.0",)),
    "3.5.1": Version(("2.9.1",)),
    "3.6.0": Version(("2.10.0", "2.11.0")),
    "3.7.0": Version(("2.12.0",), spilled_bytes=8),
    "3.7.1": Version(("2.12.1", "2.13.0"), spilled_bytes=8),
    "3.8.0": Version(("2.14.0", "2.14.1"), spilled_bytes=32),
    "3.9.0": Version(("2.15.0",), spilled_bytes=72, python=(3, 11)),
}
OLDEST, NEWEST = next(iter(VERSIONS)), next(reversed(VERSIONS))


def extra() -> tuple[str, ...]:
    """Return the oldest and the newest version that there is for this Python and system."""
    if sys.platform != "linux":
        return ()
    fit = [name for name, version in VERSIONS.items() if version.python <= sys.version_info[:2]]
    return fit[0], fit[-1]


def sentence() -> str:
    """Return what the README says of them."""
    torches = [torch for version in VERSIONS.values() for torch in version.torch]
    first, last = torches[0], torches[-1]
    return (
        f"Our kernels need Triton {OLDEST[:3]} or later, and tests compile them with {OLDEST} to\n"
        f"{NEWEST}, those of torch {first} to {last} (`docs/results/triton.md`). Without Triton "
        "other\nbackends run."
    )


def table() -> str:
    """Return a Markdown table: versions, who brings them, what a thread keeps outside registers."""
    rows = [["Triton", "torch", "bytes of a thread outside its registers, at most"], ["---"] * 3]
    for name, version in VERSIONS.items():
        rows.append([name, ", ".join(version.torch), str(version.spilled_bytes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print("\n".join(extra()))
