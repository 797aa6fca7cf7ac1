"""Reading PTX: which products an address is computed from."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from support import ptx, triton_aot

# Stores at logits + 2 * (row * stride), where the index of the row is multiplied in 32 or in 64 bits.
ENTRY = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %ctaid.x;
	mov.u32 	%r5, %tid.x;
	shl.b32 	%r6, %r5, 3;
@PRODUCT@
	add.s64 	%rd4, %rd1, %rd3;
	cvt.u64.u32 	%rd5, %r6;
	add.s64 	%rd6, %rd4, %rd5;
	st.global.b16 	[ %rd6 + 0 ], %rs1;
	ret;
}
"""
NARROW = """
	mul.lo.s32 	%r3, %r2, %r1;
	mul.wide.s32 	%rd3, %r3, 2;
"""
WIDE = """
	mul.wide.s32 	%rd2, %r2, %r1;
	shl.b64 	%rd3, %rd2, 1;
"""


@pytest.mark.parametrize(
    ("product", "found"), [(NARROW, ["mul.lo.s32 \t%r3, %r2, %r1"]), (WIDE, [])], ids=["narrow", "wide"]
)
def test_narrow_products_of_the_index_of_a_row_are_found(product, found):
    assembly = ENTRY.replace("@PRODUCT@", product.strip("\n"))
    compiled = triton_aot.Compiled("kernel", "sm_90", 4, 32, 0, 0, assembly, ("logits_ptr", "stride"))
    kernel = ptx.Kernel(compiled)
    assert kernel.narrow_products() == found
    assert [access.num_bytes for access in kernel.of("st", 0)] == [2]
