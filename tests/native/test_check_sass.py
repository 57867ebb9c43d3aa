"""What scripts/check_sass.py reads from the output of ptxas and nvdisasm, and what it refuses."""

from __future__ import annotations

import pytest

from scripts.check_sass import Loop, Resources, find_loop, parse_functions, parse_resources

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelILb0EEvv' for 'sm_90'
ptxas info    : Function properties for _Z6kernelILb0EEvv
    8 bytes stack frame, 20 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size, 4232 bytes smem
ptxas info    : Compiling entry function '_Z5plainv' for 'sm_90'
ptxas info    : Function properties for _Z5plainv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""

SASS = """
\t.section\t.text._Z6kernelILb0EEvv,"ax",@progbits
.text._Z6kernelILb0EEvv:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_2:
        /*0020*/                   LDG.E.EF.128 R4, desc[UR8][R2.64] ;
        /*0030*/               @P1 LDG.E.EF.128 R8, desc[UR8][R2.64+0x200] ;
.L_x_3:
        /*0040*/                   LDS.64 R2, [R7] ;
        /*0050*/               @P0 BRA `(.L_x_3) ;
        /*0060*/               @P1 BRA `(.L_x_4) ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
.L_x_4:
        /*0080*/                   LDG.E.64 R2, desc[UR8][R2.64] ;
        /*0090*/              @!P0 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.text._Z5plainv:
.L_x_5:
        /*0000*/                   LDG.E.64 R2, desc[UR8][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_5) ;
"""


def test_registers_spills_and_stack_are_read():
    assert list(parse_resources(PTXAS)) == [
        Resources("_Z6kernelILb0EEvv", 80, 4232, 8 + 20 + 32),
        Resources("_Z5plainv", 18, 0, 0),
    ]


def test_words_of_ptxas_that_are_not_understood_are_refused():
    with pytest.raises(SystemExit, match="does not understand"):
        list(parse_resources("Compiling entry function 'kernel' for 'sm_90'\nsomething new"))


def test_the_innermost_loop_with_wide_loads_is_found():
    # Not the loop within it, which has none; not the one around it; not the branch forward out of it.
    loop = find_loop(parse_functions(SASS)["_Z6kernelILb0EEvv"])
    assert loop == Loop(instructions=6, loads=2)
    assert loop.instructions_per_kib == 6


def test_a_kernel_without_such_a_loop_has_none():
    assert find_loop(parse_functions(SASS)["_Z5plainv"]) is None


@pytest.mark.parametrize(("loads", "each"), [(1, 200), (2, 100), (8, 25)])
def test_instructions_count_for_the_bytes_that_a_warp_loads(loads, each):
    assert Loop(100, loads).instructions_per_kib == each
