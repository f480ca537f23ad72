"""The memory of this process, now and at its peak, read from /proc (Linux only)."""

from pathlib import Path


def memory(field: str) -> int:
    """Return the bytes of the process: "VmRSS" now, "VmHWM" at the peak since its start or `restart_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux.")


def restart_peak() -> None:
    """Measure the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")
