"""Machine code that most networks need, made while torch still captures this one: LLVM needs no interpreter, and capturing needs but one core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from explorer.inference.larger_kernels import has_programs
from explorer.inference.layout import MAX_TILE
from explorer.inference.native import Emitter, Isa


@contextmanager
def code_ahead(isa: Isa, *, sparse: bool) -> Iterator[None]:
    """Make the code of the driver, and of what packs `sparse` weights, on another thread. What has not begun at the end is left to who needs it."""
    if isa.name == "torch":
        yield
        return
    from explorer.inference.kernels import (
        chain,
        driver,
        find_nonzeros,
        match_rows,
        place_entries,
        place_rows,
        registers,
        write_programs,
    )

    with Emitter() as emitter:
        if sparse:
            emitter.code(isa.single, find_nonzeros.FindNonzerosKernel())
            if registers.has_partners(MAX_TILE, isa):
                emitter.code(isa.single, match_rows.MatchRowsKernel())
                emitter.code(isa.single, place_rows.PlaceRowsKernel())
            else:
                for which in place_entries.PASSES:
                    emitter.code(isa.single, place_entries.PlaceEntriesKernel(which))
            if has_programs(isa):
                emitter.code(isa.single, write_programs.OrderColumnsKernel())
                emitter.code(isa.single, write_programs.WriteProgramsKernel(isa.element_bytes))
        for entry in driver.ENTRIES:
            emitter.code(isa, driver.DriverKernel(entry))
        emitter.code(isa, chain.ChainKernel())
        yield
