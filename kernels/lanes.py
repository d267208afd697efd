"""What a single lane of a warp does: vector loads, two numbers of a word at a time, its part of a tensor-core multiply.

All values are one-dimensional, one element a thread, so element ``i`` of any of them belongs to thread ``i`` whatever
layouts Triton chooses; instructions that a warp executes together may then be spelled out.  A *word* is an int32 of two
fp16 or bf16.  Triton's interpreter knows no assembly: beside every instruction stands what it means.
"""

# A jitted function is typed by Triton at launch, not by annotations; its tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from mixcomp.kernels.operand import INTERPRETED


@triton.constexpr_function
def load_assembly(count, zero):
    """Read-only words where the predicate is; elsewhere zero, or else whatever there is in words that are read but once and
    push nothing out of the L1."""
    outs = ", ".join(f"${i}" for i in range(count))
    vector = f".v{count}.b32 {{{outs}}}" if count > 1 else ".b32 $0"
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count)) if zero else ""
    load = f"@p ld.global.nc{'' if zero else '.L1::no_allocate'}{vector}, [${count}];"
    return f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {zeros} {load} }}"


@triton.jit
def load_words(address, keep, COUNT: tl.constexpr, ZERO: tl.constexpr):
    """COUNT (1, 2 or 4) neighbouring int32; where not ``keep`` they are zero if ZERO, else anything.

    Addresses are multiples of their size.
    """
    if INTERPRETED:
        found = ()
        for I in tl.static_range(COUNT):  # noqa: E741 - a constant
            found += (tl.load(address + I, mask=keep, other=0 if ZERO else -1),)
        return found
    elif COUNT == 1:
        word = tl.inline_asm_elementwise(
            load_assembly(1, ZERO), "=&r,l,r", [address.to(tl.int64), keep.to(tl.int32)], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
        return (word,)
    elif COUNT == 2:
        return tl.inline_asm_elementwise(
            load_assembly(2, ZERO), "=&r,=&r,l,r", [address.to(tl.int64), keep.to(tl.int32)],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            load_assembly(4, ZERO), "=&r,=&r,=&r,=&r,l,r", [address.to(tl.int64), keep.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def laid_over(word, mask, ground):
    """``word & mask | ground``: one instruction, if the ground is no constant to the compiler."""
    if INTERPRETED:
        return word & mask | ground
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, mask, ground], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.constexpr_function
def store_assembly(count):
    """Words where the predicate is; an instruction of Triton's has to return something."""
    words = ", ".join(f"${i + 3}" for i in range(count))
    store = f"@p st.global.v{count}.b32 [$1], {{{words}}};"
    return f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; {store} mov.b32 $0, 0; }}"


@triton.constexpr_function
def store_registers(count):
    """Where they are: what is returned, the address, the predicate, the words."""
    return "=r,l,r" + ",r" * count


@triton.jit
def store_words(address, words, keep, COUNT: tl.constexpr):
    """Store COUNT (2 or 4) neighbouring int32 where ``keep``; addresses are multiples of their size."""
    if INTERPRETED:
        for I in tl.static_range(COUNT):  # noqa: E741 - a constant
            tl.store(address + I, words[I], mask=keep)
    else:
        given = (address.to(tl.int64), keep.to(tl.int32))
        tl.inline_asm_elementwise(
            store_assembly(COUNT), store_registers(COUNT), given + words, dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def upper_bytes(first, second):
    """A word of the upper bytes of four halves."""
    if INTERPRETED:
        low = ((first >> 8) & 0xFF) | ((first >> 16) & 0xFF00)
        return low | ((second << 8) & 0xFF0000) | (second & -0x1000000)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def joined(low, high):
    """A word of two halves."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def rounded(low, high, DTYPE: tl.constexpr):
    """Two fp32 as the halves of a word."""
    if INTERPRETED:
        return joined(low.to(DTYPE), high.to(DTYPE))
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def parted(word, DTYPE: tl.constexpr):
    """The halves of a word in fp32."""
    low, high = (word & 0xFFFF).to(tl.uint16), ((word >> 16) & 0xFFFF).to(tl.uint16)
    return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)


@triton.constexpr_function
def twice(value, bfloat):
    """A number that the type holds, in both halves of a word.

    Known before anything is compiled: as an expression it would be eight operations for the compiler to fold.
    """
    exponent, left = 0, abs(value)
    while left >= 2:
        exponent, left = exponent + 1, left / 2
    while 0 < left < 1:
        exponent, left = exponent - 1, left * 2
    digits, bias = (7, 127) if bfloat else (10, 15)
    bits = ((exponent + bias) << digits) + int((left - 1) * 2**digits) if left else 0
    word = (bits + (value < 0) * 2**15) * 0x10001
    return word - 2**32 if word >= 2**31 else word


@triton.constexpr_function
def affine_assembly(bfloat, factor_half, summand_half):
    """One fused multiply-add: instructions take either half of a register twice."""
    kind = "bf16x2" if bfloat else "f16x2"
    return (
        "{ .reg .b16 f0, f1, s0, s1; .reg .b32 f, s; mov.b32 {f0, f1}, $2; mov.b32 {s0, s1}, $3; "
        f"mov.b32 f, {{f{factor_half}, f{factor_half}}}; mov.b32 s, {{s{summand_half}, s{summand_half}}}; "
        f"fma.rn.{kind} $0, $1, f, s; }}"
    )


@triton.jit
def affine(word, factor, summand, FACTOR_HALF: tl.constexpr, SUMMAND_HALF: tl.constexpr, DTYPE: tl.constexpr):
    """``word * factor + summand`` for both halves of the word with one half of the others, rounded once."""
    if INTERPRETED:
        factor, summand = word * 0 + factor, word * 0 + summand  # numbers, too
        factor = ((factor >> (16 * FACTOR_HALF)) & 0xFFFF) * 0x10001
        summand = ((summand >> (16 * SUMMAND_HALF)) & 0xFFFF) * 0x10001
        return joint_affine(word, factor, summand, DTYPE)
    else:
        return tl.inline_asm_elementwise(
            affine_assembly(tl.bfloat16 == DTYPE, FACTOR_HALF, SUMMAND_HALF), "=r,r,r,r", [word, factor, summand],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.constexpr_function
def joint_assembly(bfloat):
    """The same, half by half."""
    return f"fma.rn.{'bf16x2' if bfloat else 'f16x2'} $0, $1, $2, $3;"


@triton.jit
def joint_affine(word, factor, summand, DTYPE: tl.constexpr):
    """``word * factor + summand``, half by half, rounded once."""
    if INTERPRETED:
        low, high = parted(word, DTYPE)
        low_factor, high_factor = parted(word * 0 + factor, DTYPE)
        low_summand, high_summand = parted(word * 0 + summand, DTYPE)
        return joined((low * low_factor + low_summand).to(DTYPE), (high * high_factor + high_summand).to(DTYPE))
    else:
        return tl.inline_asm_elementwise(
            joint_assembly(tl.bfloat16 == DTYPE), "=r,r,r,r", [word, factor, summand], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.constexpr_function
def multiply_assembly(bfloat):
    """Sixteen rows by sixteen columns times sixteen columns by eight tokens, by a warp."""
    half = "bf16" if bfloat else "f16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, "
        "{$10, $11, $12, $13};"
    )


@triton.jit
def multiply(sums, a, b, DTYPE: tl.constexpr):
    """``sums + a @ b`` in fp32, a lane's share of each: ``mma.m16n8k16`` of the PTX manual.

    With ``t = lane % 4`` and ``j`` a half: a holds rows ``lane // 4`` and 8 more, columns ``2 t + j``, then the same of 8
    columns more; b the columns ``2 t + j`` and 8 more of token ``lane // 4``; sums hold tokens ``2 t + j`` of row
    ``lane // 4``, then of 8 rows more.
    """
    if INTERPRETED:
        return multiplied(sums, a, b, DTYPE)
    else:
        return tl.inline_asm_elementwise(
            multiply_assembly(tl.bfloat16 == DTYPE), "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", a + b + sums,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def multiplied(sums, a, b, DTYPE: tl.constexpr):
    """What ``multiply`` means."""
    WARPS: tl.constexpr = a[0].shape[0] // 32
    a00, a01 = parted(a[0], DTYPE)
    a10, a11 = parted(a[1], DTYPE)
    a20, a21 = parted(a[2], DTYPE)
    a30, a31 = parted(a[3], DTYPE)
    low, high = tl.join(tl.join(a00, a20), tl.join(a10, a30)), tl.join(tl.join(a01, a21), tl.join(a11, a31))
    # warp, lane // 4, lane % 4, k8, r8, j -> warp, r8, lane // 4, k8, lane % 4, j
    rows = tl.permute(tl.reshape(tl.join(low, high), (WARPS, 8, 4, 2, 2, 2)), (0, 4, 1, 3, 2, 5))
    b00, b01 = parted(b[0], DTYPE)
    b10, b11 = parted(b[1], DTYPE)
    tokens = tl.reshape(tl.join(tl.join(b00, b10), tl.join(b01, b11)), (WARPS, 8, 4, 2, 2))
    tokens = tl.reshape(tl.permute(tokens, (0, 3, 2, 4, 1)), (WARPS, 16, 8))
    product = tl.dot(tl.reshape(rows, (WARPS, 16, 16)), tokens, input_precision="ieee")
    product = tl.permute(tl.reshape(product, (WARPS, 2, 8, 4, 2)), (0, 2, 3, 1, 4))  # warp, lane // 4, lane % 4, r8, j
    even, odd = tl.split(tl.reshape(product, (WARPS * 32, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return sums[0] + first, sums[1] + second, sums[2] + third, sums[3] + fourth
