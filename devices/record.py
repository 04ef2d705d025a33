"""What is known of a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

CHANGING = ("system", "memory_mb")  # with an update of the kernel, or a reboot
Count = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """A part of the file; unknown fields are errors, so that a misspelt one is not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceRecord(Strict):
    """Which device; None where it does not say."""

    address: str = Field(max_length=1024)
    name: str = Field(max_length=256)
    cpu: str | None = Field(default=None, max_length=256)
    machine: str | None = Field(default=None, max_length=64)
    system: str | None = Field(default=None, max_length=256)
    cores: Count | None = None
    memory_mb: Count | None = None

    def unlike(self, other: DeviceRecord) -> Iterator[tuple[str, Any, Any]]:
        """What tells this device from another one: a field, and its value here and there."""
        for name, value in self:
            if name not in CHANGING and value != getattr(other, name):
                yield name, value, getattr(other, name)
