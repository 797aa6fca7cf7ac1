"""The counted model of the CUDA C++ kernels: the committed figures hold, and a slower kernel is noticed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from bench import gpu_model, sass
from bench.gpu_model import COMMITTED, KERNELS_BY_OP, ROOT, broken_limits, count, missing_tool, rises

needs_tools = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
SMALLEST = (8192, 32000, 1600)

# Two blocks around a loop of three instructions, and a copy for warps that have diverged.
LISTING = """
	.section	.text.kernel,"ax",@progbits
	//## File "/csrc/cuda/kernel.cuh", line 3 inlined at "/csrc/cuda/kernel.cuh", line 9
	//## File "/csrc/cuda/kernel.cuh", line 9
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
	//## File "/csrc/cuda/device.cuh", line 5 inlined at "/csrc/cuda/kernel.cuh", line 4
	//## File "/csrc/cuda/kernel.cuh", line 4 inlined at "/csrc/cuda/kernel.cuh", line 9
	//## File "/csrc/cuda/kernel.cuh", line 9
        /*0020*/                   MUFU.EX2 R1, R0 ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_3) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   SHFL.UP R1, R0 ;
        /*0070*/                   BRA `(.L_x_1) ;
"""
ENTRY, STEP, LOOP = (("cuda/kernel.cuh", line) for line in (9, 3, 4))


def test_gpu_model_executes_blocks_as_often_as_their_lines():
    blocks = sass.blocks_of(LISTING, Path("/csrc"))
    assert [[opcode for opcode, _ in block.instructions] for block in blocks] == [
        ["S2R", "BRA"],
        ["MUFU.EX2", "BRA.DIV", "BRA"],
        ["EXIT"],
    ]
    assert [block.loop for block in blocks] == [None, frozenset({1}), None]
    assert blocks[0].instructions[0][1] == (STEP, ENTRY)
    assert blocks[1].instructions[0][1] == (LOOP, ENTRY)
    row = gpu_model.Run(1, 0, 0, 0, {(STEP, ENTRY): 16, (LOOP, ENTRY): 1000})
    assert gpu_model.executed_by_block(sass.Code(blocks, 32), row, warps=16) == [16, 1000, 16]


def test_gpu_model_counts_a_stack_with_calls_left_out_as_the_whole_one():
    other = ("cuda/kernel.cuh", 7)
    executed = {(STEP, LOOP, ENTRY): 5, (STEP, other, ENTRY): 3, (LOOP, ENTRY): 8}
    found = gpu_model.counted_stacks([(STEP, ENTRY), (STEP, other, ENTRY), (other, ENTRY), ()], executed)
    assert found == {
        (STEP, ENTRY): [(STEP, LOOP, ENTRY), (STEP, other, ENTRY)],
        (STEP, other, ENTRY): [(STEP, other, ENTRY)],
        (other, ENTRY): [],
    }


def test_gpu_model_bounds_blocks_by_those_that_lead_to_them():
    # The last block has no line of its own, and the block before it is one that a single warp of 16 enters.
    exit_, step = ("EXIT", ()), ("SHFL.UP", (STEP, ENTRY))
    blocks = [
        sass.Block(0, [("BRA", (ENTRY,))], [1, 2], None, frozenset({0})),
        sass.Block(1, [step], [3], None, frozenset({0, 1})),
        sass.Block(2, [exit_], [], None, frozenset({0, 2})),
        sass.Block(3, [exit_], [], None, frozenset({0, 1, 3})),
    ]
    row = gpu_model.Run(1, 0, 0, 0, {(ENTRY,): 16, (STEP, ENTRY): 1})
    assert gpu_model.executed_by_block(sass.Code(blocks, 32), row, warps=16) == [16, 1, 16, 1]


@needs_tools
@pytest.mark.parametrize(
    "op",
    [
        "topk_logits",
        # Their kernels have five times as many instructions.
        pytest.param("slim_loss", marks=pytest.mark.slow),
        pytest.param("sample_logits", marks=pytest.mark.slow),
    ],
)
def test_gpu_model_of_a_kernel_is_the_committed_one(op):
    kernel = KERNELS_BY_OP[op]
    found = count(kernel, shapes=kernel.shapes[:1])
    print("\n".join(gpu_model.table(found, phases=False)))  # noqa: T201 -- shown by pytest -s
    assert rises(found, json.loads(COMMITTED.read_text())) == broken_limits(found) == []
    # Every logit takes a conversion, two operations in the exponent, an exponential and an addition at least.
    assert found[0].instructions_per_row >= 5 * found[0].shape[1] / 32


def test_gpu_model_counts_the_bytes_that_must_move():
    # Ten bfloat16 logits are read; three of them, three 32-bit ids and two log-sum-exps are written. Of two rows.
    assert KERNELS_BY_OP["topk_logits"].bytes_of(2, 10, 3) == 2 * (20 + 6 + 12 + 8)


@needs_tools
def test_gpu_model_notices_another_pass_over_the_candidates(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    kernel = csrc / "cuda/topk_logits.cuh"
    source = kernel.read_text()
    step = "write_tiles(found);"
    assert source.count(step) == 1
    kernel.write_text(source.replace(step, 2 * step))
    assert len(rises(count(KERNELS_BY_OP["topk_logits"], csrc, [SMALLEST]), json.loads(COMMITTED.read_text()))) == 1


def test_gpu_model_names_what_rose_and_what_is_unknown():
    result = gpu_model.Result("topk_logits", SMALLEST, 1060, {}, 1, 99, 9, 63, 87184, 1, 2)
    row = {"op": "topk_logits", "shape": list(SMALLEST), "instructions_per_row": 1000}
    assert rises([result], [row]) == [f"topk_logits {SMALLEST}: instructions a row rose from 1000 to 1060"]
    assert rises([result], [row | {"instructions_per_row": 1020}]) == []
    assert rises([result], []) == [f"topk_logits {SMALLEST} is not in gpu_model.json; run with --write"]
    assert broken_limits([result]) == [f"topk_logits {SMALLEST}: 99 barriers a row, at most 9 allowed"]
    assert any("target MISSED" in line or "target met" in line for line in gpu_model.table([result], phases=False))
    assert math.isclose(result.issue_floor_ms, 1060 * 8192 / (132 * 4 * 1.98e9) * 1e3)


def test_gpu_model_table_says_which_targets_are_met():
    def counted(op: str, instructions: int, shape: tuple[int, int, int] = SMALLEST) -> gpu_model.Result:
        return gpu_model.Result(op, shape, instructions, {}, KERNELS_BY_OP[op].bytes_of(*shape), 3, 0, 64, 9, 1, 2)

    rows = [counted("topk_logits", 17000), counted("slim_loss", 20000), counted("sample_logits", 9, (8, 100, 0))]
    lines = gpu_model.markdown_table(rows).splitlines()[2:]
    # For all rows 133 us of instructions and 140 us of bytes, 157 and 262 us, and of both 289 and 366 us.
    assert lines == [
        "| `topk_logits` | 8192 x 32000 | 1600 | 17000 | 0.133 ms | 0.140 ms | 0.95 | ratio 0.8, missed | 3 of 9 |",
        "| `slim_loss` | 8192 x 32000 | 1600 | 20000 | 0.157 ms | 0.262 ms | 0.60 | ratio 0.8, met | 3 of 5 |",
        "| `sample_logits` | 8 x 100 | all | 9 | 0.000 ms | 0.000 ms | 0.17 | 0.025 ms, met | 3 of 6 |",
        "| `topk_logits` + `slim_loss` | 8192 x 32000 | 1600 |  | 0.290 ms | 0.366 ms | 0.79 | ratio 0.8, met |  |",
    ]
    console = "\n".join(gpu_model.table(rows, phases=False))
    assert (console.count("target met"), console.count("target MISSED")) == (3, 1)
    assert "target met: both floors <= 0.025 ms, the larger is 0.000 ms" in console
