"""Hazards and waits in small texts of Hopper machine code, as cuobjdump writes them."""

import pytest

from fastvit_kernels.tuning import sass

HGMMA = "HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR4], R24"


def listing(*instructions: str) -> str:
    """A function of these instructions, at addresses 0x0, 0x10, and so on."""
    lines = [f"        /*{16 * i:04x}*/                   {text} ;    /* 0x0 */" for i, text in enumerate(instructions)]
    return "\tcode for sm_90a\n\t\tFunction : kernel\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "writer",
    [
        "MOV R96, R1",
        "IADD3 R99, P0, R1, R2, RZ",
        "LOP3.LUT P0, R97, R1, R2, RZ, 0xc0, !PT",
        "SHFL.BFLY PT, R98, R1, 0x1, 0x1f",
        "@!P5 IABS R96, R1",
        "IMAD.WIDE R95, R1, R2, R3",  # R95 and R96
        "LDG.E.128 R93, desc[UR4][R2.64]",
        "LDSM.16.M88.4 R93, [R1]",
        "CS2R R98, SRZ",
        "HGMMA.64x16x16.F32.BF16 R92, gdesc[UR8], RZ, !UPT",
    ],
)
def test_a_register_that_a_product_reads_is_overwritten(writer: str) -> None:
    assert sass.hazards(listing(f"{HGMMA}, gsb0", writer, "EXIT")) == 1
    assert sass.hazards(listing(HGMMA, writer, "EXIT")) == 1  # before its group is closed
    assert sass.hazards(listing(f"{HGMMA}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", writer, "EXIT")) == 0


@pytest.mark.parametrize(
    "reader",
    [
        "MOV R95, R96",
        "STS.128 [R96], R96",
        "STG.E desc[UR4][R96.64], R97",
        "ISETP.GE.AND P0, PT, R96, R1, PT",
        "FSETP.GT.FTZ.AND P1, PT, |R97|, R1, PT",
        "BAR.SYNC R96, R97",
        "R2UR UR4, R96",
        "LDG.E.128 R92, desc[UR4][R96.64]",  # R92 to R95
        "HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR4], R24",
    ],
)
def test_reading_is_no_hazard(reader: str) -> None:
    assert sass.hazards(listing(f"{HGMMA}, gsb0", reader, "EXIT")) == 0


def test_a_wait_may_leave_younger_groups_pending() -> None:
    older, younger = f"{HGMMA}, gsb0", f"{HGMMA.replace('R96', 'R100')}, gsb0"
    code = [older, younger, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R96, R1", "MOV R100, R1", "EXIT"]
    assert sass.overwriting(*sass.functions(listing(*code))) == {0x40}
    assert sass.waits(listing(*code)) == 1


def test_a_hazard_that_only_the_next_turn_of_a_loop_has() -> None:
    code = ["MOV R1, RZ", "MOV R96, R1", f"{HGMMA}, gsb0", "@P0 BRA 0x10", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"]
    assert sass.overwriting(*sass.functions(listing(*code))) == {0x10}
    code.insert(3, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert sass.hazards(listing(*code)) == 0


def test_what_is_behind_an_unconditional_branch_is_not_reached() -> None:
    code = [f"{HGMMA}, gsb0", "BRA 0x30", "MOV R96, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R96, R1", "EXIT"]
    assert sass.hazards(listing(*code)) == 0
    code[1] = "@!P0 BRA 0x30"
    assert sass.hazards(listing(*code)) == 1


def test_each_function_begins_with_nothing_pending() -> None:
    assert sass.hazards(listing(f"{HGMMA}, gsb0", "EXIT") + listing("MOV R96, R1", "EXIT")) == 0
